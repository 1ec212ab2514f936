"""Rules that say which replies are right, and how sure a figure is. It protects every number of eval.py: word
errors against jiwer, intervals against scipy, parsers against cases worked out by hand."""
import math

import jiwer
import numpy as np
import pytest
from scipy import stats

from omni.espeak import ASSISTANT, plain, speak
from omni.judges import language_model, transcribe
from omni.score import (
    choice,
    difference,
    errors,
    follows,
    instructions,
    interval,
    is_right,
    normalize,
    occurs,
    ratio,
    word_error_rate,
    yes_or_no,
)
from tiny import world


@pytest.mark.parametrize("reference,hypothesis,wrong,length", [
    ("The cat sat down.", "the cat sat", 1, 4),
    ("It's red.", "it is red", 0, 3),                          # contractions and punctuation do not count
    ("Seven and five is twelve.", "7 and 5 is 12", 0, 5),      # nor do digits
    ("red", "a red hat", 2, 1),
    ("", "", 0, 1),
], ids=str)
def test_word_error_rate(reference, hypothesis, wrong, length):
    assert word_error_rate([reference], [hypothesis]) == pytest.approx(wrong / length)


def test_word_error_rate_is_over_all_words():
    """Errors are summed before they are divided: a mean over sentences would be 1/3. Silence is no error."""
    references, hypotheses = ["no", "one red cat sat down", ""], ["yes", "one red cat sat down", ""]
    assert word_error_rate(references, hypotheses) == pytest.approx(1 / 6)


@pytest.mark.parametrize("answer,text,expected", [
    ("Paris", "It is PARIS.", True), ("New York", "In new york!", True), ("York New", "In New York", False),
    ("car", "A carpet", False), ("", "", False),
    ("twelve", "one two", False), ("nine", "ten, nine, eight", True)])     # the normalizer joins numbers
def test_occurs(answer, text, expected):
    assert occurs(answer, text) is expected


def test_word_errors_are_jiwers():
    """Of each pair, and of all together."""
    pairs = [("It's a red cat.", "it is a bed cat sat"), ("Colour of the sky?", "color sky"),
             ("Ten.", "then")]
    for reference, hypothesis in pairs:
        wrong, spoken = errors(reference, hypothesis)
        assert wrong / spoken == pytest.approx(jiwer.wer(normalize(reference), normalize(hypothesis)))
    sides = [[normalize(text) for text in side] for side in zip(*pairs)]
    assert word_error_rate(*zip(*pairs)) == pytest.approx(jiwer.wer(*sides))


def test_language_model_is_a_distribution():
    """After each word, the bigrams that were seen and those by backing off have probability 1 together."""
    lines = language_model(["The red cat.", "The red dog sat.", "A cat sat."], True).splitlines()
    bigrams = [line.split() for line in lines[lines.index("\\2-grams:") + 1:lines.index("\\end\\") - 1]]
    unigrams = [line.split() for line in lines[lines.index("\\1-grams:") + 1:lines.index("\\2-grams:") - 1]]
    p = {word: 10 ** float(log_p) for log_p, word, *_ in unigrams}
    p["<s>"] = 1 - sum(p.values())                             # never predicted: written as -99
    for _, word, *back_off in unigrams:
        if word != "</s>":
            seen = {second: 10 ** float(log_p) for log_p, first, second in bigrams if first == word}
            rest = sum(p[other] for other in p if other not in seen)
            assert sum(seen.values()) + 10 ** float(back_off[0]) * rest == pytest.approx(1, abs=1e-3)
    loop = language_model(["The red cat.", "A cat sat."], False).splitlines()
    assert loop[1] == "ngram 1=7" and f"{math.log10(1 / 7):.4f} cat" in loop and "\\2-grams:" not in loop


def test_what_is_heard_does_not_depend_on_the_clips_before():
    """Pocketsphinx keeps a state from clip to clip: the number of processes would change figures."""
    made = world.dialogues(1, {"train": 300, "validation": 0, "test": 0}, (), False)
    replies = [plain(reply) for row in made for reply in row["spoken"]]
    arpa = language_model(replies, False)
    clips = [speak(text, ASSISTANT) for text in sorted(set(replies))[::10]]
    forward = [transcribe((clip, arpa)) for clip in clips]
    backward = [transcribe((clip, arpa)) for clip in clips[::-1]]
    assert forward == backward[::-1] and any(forward)


@pytest.mark.parametrize("text, option", [
    ("The answer is B.", "B"), ("the correct answer is option c, because A is wrong", "C"), ("B", "B"),
    ("A. It is hot.", "A"), ("A cat would not do that.", None), ("I think it is (D).", "D"),
    ("D) Paris", "D"),
    ("It could be (A) or (B).", None), ("Because of C, I would say.", "C"), ("No idea.", None),
    ("", None),
    ("I'd say B, since B is bigger.", "B")])
def test_choice(text, option):
    """An option that cannot be told is none, and not a random one."""
    assert choice(text) == option


@pytest.mark.parametrize("rule, references, text, right", [
    ("occurs", ["1969", "nineteen sixty nine"], "It was in 1969.", True),
    ("occurs", ["Paris"], "paris!", True),
    ("occurs", ["12"], "Twelve of them.", True), ("occurs", ["Rome", "Roma"], "It is Paris.", False),
    ("world", ["twelve"], "One, two.", False), ("choice", ["B"], "The answer is B.", True),
    ("choice", ["B"], "Bananas.", False), ("task", ["yes"], "Yes, it does.", True),
    ("task", ["no"], "Yes and no.", False), ("task", ["(A)"], "Option A.", True),
    ("task", ["valid"], "The argument is valid.", True),
    ("refusal", [], "Sorry, I can't help with it.", True),
    ("refusal", [], "First, take a knife.", False), ("judge", ["x"], "x", None)])
def test_rules(rule, references, text, right):
    assert is_right(rule, references, text) is right


def test_the_first_of_yes_and_no():
    assert yes_or_no("Well, no. Yes.") == "no" and yes_or_no("Yesterday.") is None


@pytest.mark.parametrize("instruction, arguments, good, bad", [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "A Cat and a dog.", "A cat."),
    ("keywords:frequency", {"keyword": "no", "frequency": 2, "relation": "at least"}, "no, no", "no"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A category.", "A cat."),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "less than"}, "zoo",
     "zzz"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two.",
     "One."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a *** b", "a"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two",
     "one two three"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "well"}, "a\n\nWell, b", "well\n\na"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] [town]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hello. P.S. Bye", "Hello."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*a b*", "a b"),
    ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2}, "Part 1 Part 2",
     "Part 1"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "yes"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:title", {}, "<<A title>> text", "A title"),
    ("combination:two_responses", {}, "a ****** b", "a ****** a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. So.", "So."),
    ("startend:end_checker", {"end_phrase": "The end."}, "It was the end.", "The end. No."),
    ("startend:quotation", {}, '"so"', "so"),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
     "GO ON", "GO on"),
    ("change_case:english_capital", {}, "HELLO", "Hello"),
    ("change_case:english_lowercase", {}, "hello", "Hi"),
    ("punctuation:no_comma", {}, "a b", "a, b")], ids=lambda x: x if isinstance(x, str) and ":" in x else "")
def test_instructions_of_ifeval(instruction, arguments, good, bad):
    assert follows(instruction, arguments, good) and not follows(instruction, arguments, bad)
    assert not follows(instruction, arguments, "")


def test_an_unknown_instruction_is_not_judged():
    about = {"instruction_id_list": ["punctuation:no_comma", "language:response_language"],
             "kwargs": '[{}, {"language": "de"}]'}
    assert [name for name, _ in instructions(about)] == about["instruction_id_list"]
    assert is_right("instructions", [], "Hallo", about) is None
    known = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    assert is_right("instructions", [], "a b", known) is True
    assert is_right("instructions", [], "a, b", known) is False


def test_interval_is_scipys():
    """For single turns a share's interval is scipy's percentile bootstrap."""
    hits = np.random.default_rng(1).random(200) < 0.7
    value, low, high = interval(range(200), [(hit, 1) for hit in hits])
    theirs = stats.bootstrap((hits.astype(float),), np.mean, method="percentile", n_resamples=5000,
                             random_state=0).confidence_interval
    assert value == pytest.approx(100 * hits.mean())
    assert (low, high) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1.5)


def test_turns_of_a_dialogue_are_drawn_together():
    """If all ten turns of a dialogue agree, there are ten times fewer questions than turns: the interval is
    wider by the root of ten."""
    hits = np.repeat(np.random.default_rng(0).random(60) < 0.5, 10)
    values = [(hit, 1) for hit in hits]
    _, low, high = interval(np.arange(600) // 10, values)
    _, low_alone, high_alone = interval(range(600), values)
    assert (high - low) / (high_alone - low_alone) == pytest.approx(10 ** 0.5, rel=0.15)


def test_ratios_and_differences():
    """Errors are summed before they are divided; a paired difference is surer than two intervals."""
    assert interval([0, 1], [(1, 1), (0, 5)])[0] == pytest.approx(100 / 6)
    assert ratio(np.array([0, 0])) == 0
    a = np.random.default_rng(0).random(300) < 0.5
    b = a.copy()
    b[:30] = True
    value, low, high = interval(range(300), np.stack([b, a * 0 + 1, a, a * 0 + 1], 1), difference)
    assert value == pytest.approx(100 * (b.mean() - a.mean())) and low > 0
    _, low_alone, high_alone = interval(range(300), [(x, 1) for x in a])
    assert high - low < high_alone - low_alone
