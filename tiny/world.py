"""
The embedded world: what people say in it.

Why: a spoken chatbot needs dialogues, speech and three pretrained backbones, and the demo downloads none of
them. So this file makes a world that is small enough to be learned on two CPU cores and still needs every
part of the system: ears (many voices and accents), knowledge (capitals, opposites, sums ...), memory ("what
is my name?") and a mouth (one fixed assistant voice). omni/espeak.py speaks it.

How: `dialogue(rng, split)` draws a dialogue, `dialogues(seed, counts)` draws those of a corpus.

What "held out" means: every question sentence is hashed into train, validation or test, and a dialogue of a
split holds only sentences of that split. Greetings, and questions about an earlier turn such as "What is my
name?", are shared; there the earlier statement is the held-out sentence. Every voice belongs to one split
too. So a test dialogue asks what was never asked in training, in a voice that was never heard.
"""
import hashlib
import random

import numpy as np

from omni.espeak import draw_voice

# -------------------------------------------------------------------------------------------------- knowledge

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
           "sixteen seventeen eighteen").split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "England": "London",
            "Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens",
            "Portugal": "Lisbon", "Austria": "Vienna", "Norway": "Oslo", "Poland": "Warsaw",
            "Kenya": "Nairobi", "Ireland": "Dublin"}
OPPOSITES = [("hot", "cold"), ("big", "small"), ("left", "right"), ("old", "young"), ("happy", "sad"),
             ("open", "closed"), ("light", "dark"), ("hard", "soft"), ("rich", "poor"), ("early", "late"),
             ("strong", "weak"), ("clean", "dirty")]
OPPOSITE = dict(OPPOSITES + [(b, a) for a, b in OPPOSITES])
COLORS = {"banana": "yellow", "lemon": "yellow", "tomato": "red", "cherry": "red", "carrot": "orange",
          "pumpkin": "orange", "frog": "green", "leaf": "green", "cucumber": "green", "snowman": "white",
          "swan": "white", "tire": "black", "plum": "purple",
          "elephant": "gray", "dolphin": "gray", "bear": "brown", "potato": "brown", "blueberry": "blue"}
KINDS = {"animal": "frog swan elephant dolphin bear mouse cat dog sheep horse whale rabbit".split(),
         "fruit": "banana lemon cherry plum blueberry mango peach".split(),
         "vegetable": "carrot potato cucumber pumpkin cabbage".split(),
         "city": list(CAPITALS.values()), "country": list(CAPITALS), "month": MONTHS,
         "color": sorted(set(COLORS.values()))}
SIZES = "mouse frog cat dog sheep horse elephant whale".split()       # from small to big
NAMES = ("Anna Peter Maria Thomas Julia David Laura Simon Emma Martin Alice Robert Nina Oscar Clara Henry "
         "Susan George Lisa Daniel").split()
FOODS = "bread cheese pizza soup rice pasta chocolate salad honey butter".split()
PETS = "cat dog rabbit horse mouse frog".split()
MOODS = "happy sad hungry angry busy sleepy strong young clean".split()            # for "repeat after me"


def a(noun):
    """`noun` with its article: "an elephant", "a cat"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def cap(text):
    return text[0].upper() + text[1:]


# Each topic draws (question, reply, answer): the answer is the part of the reply that makes it right.

def arithmetic(rng, memory):
    x, y = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < 0.5:
        op, z = f"{NUMBERS[x]} plus {NUMBERS[y]}", x + y
    else:
        x, y = max(x, y), min(x, y)
        op, z = f"{NUMBERS[x]} minus {NUMBERS[y]}", x - y
    q = rng.choice(["What is {}?", "How much is {}?", "Tell me, what is {}?", "Can you work out {}?"])
    return q.format(op), f"{cap(op)} is {NUMBERS[z]}.", NUMBERS[z]


def capitals(rng, memory):
    country = rng.choice(list(CAPITALS))
    city = CAPITALS[country]
    if rng.random() < 0.7:
        q = rng.choice(["What is the capital of {}?", "Tell me the capital of {}.",
                        "Do you know the capital of {}?", "Which city is the capital of {}?"])
        return q.format(country), f"The capital of {country} is {city}.", city
    q = rng.choice(["{} is the capital of which country?", "In which country is {}?",
                    "Where is the city of {}?", "Which country has the city of {}?"])
    return q.format(city), f"{city} is in {country}.", country


def opposites(rng, memory):
    word = rng.choice(list(OPPOSITE))
    q = rng.choice(["What is the opposite of {}?", "Tell me the opposite of {}.",
                    "Which word is the opposite of {}?", "What do you call the opposite of {}?"])
    return q.format(word), f"The opposite of {word} is {OPPOSITE[word]}.", OPPOSITE[word]


def calendar(rng, memory):
    names, kind = rng.choice([(DAYS, "day"), (MONTHS, "month")])
    i, (side, step) = rng.randrange(len(names)), rng.choice([("after", 1), ("before", -1)])
    q = rng.choice(["Which {0} comes {1} {2}?", "What {0} comes {1} {2}?", "Tell me the {0} {1} {2}.",
                    "What is the {0} {1} {2}?"])
    other = names[(i + step) % len(names)]
    return q.format(kind, side, names[i]), f"{other} comes {side} {names[i]}.", other


def colors(rng, memory):
    thing = rng.choice(list(COLORS))
    q = rng.choice(["What color is {}?", "Tell me the color of {}.", "Which color does {} have?",
                    "Do you know the color of {}?"])
    return q.format(a(thing)), f"{cap(a(thing))} is {COLORS[thing]}.", COLORS[thing]


def kinds(rng, memory):
    kind = rng.choice(["animal", "fruit", "vegetable", "city", "country", "month", "color"])
    thing = rng.choice(KINDS[kind])
    name = a(thing) if kind in ("animal", "fruit", "vegetable") else thing
    q = rng.choice(["What is {}?", "What kind of thing is {}?", "Tell me what {} is.",
                    "Do you know what {} is?"])
    return q.format(name), f"{cap(name)} is {a(kind)}.", kind


def counting(rng, memory):
    start = rng.randint(0, 10)
    run = NUMBERS[start:min(12, start + rng.randint(2, 5)) + 1]
    q = rng.choice(["Count from {} to {}.", "Please count from {} to {}.", "Can you count from {} to {}?",
                    "Start at {} and count to {}."])
    if rng.random() < 0.3:
        run, q = run[::-1], rng.choice(["Count down from {} to {}.", "Please count down from {} to {}.",
                                         "Can you count down from {} to {}?"])
    return q.format(run[0], run[-1]), cap(", ".join(run)) + ".", " ".join(run)


def comparing(rng, memory):
    x, y = rng.sample(range(len(SIZES)), 2)
    word = rng.choice(["bigger", "smaller"])
    if (x > y) == (word == "bigger"):
        winner, loser = SIZES[x], SIZES[y]
    else:
        winner, loser = SIZES[y], SIZES[x]
    q = rng.choice(["Which is {}, {} or {}?", "What is {}, {} or {}?", "Tell me which is {}, {} or {}."])
    question = q.format(word, a(SIZES[x]), a(SIZES[y]))
    return question, f"{cap(a(winner))} is {word} than {a(loser)}.", f"{winner} is {word}"


def repeating(rng, memory):
    color = rng.choice(KINDS["color"]) + " " if rng.random() < 0.5 else ""
    said = f"the {color}{rng.choice(KINDS['animal'])} is {rng.choice(MOODS)}"
    q = rng.choice(["Repeat after me: {}.", "Please say: {}.", "Say that {}."])
    return q.format(said), f"{cap(said)}.", said


# what is told -> (values, ways to tell it, reply, ways to ask for it, answer)
MEMORY = {
    "name": (
        NAMES,
        ["My name is {}.", "Hello, my name is {}.", "I am {}.", "You can call me {}.", "People call me {}.",
         "Good morning, I am {}.", "Please call me {}.", "Hello, I am {}."],
        "Nice to meet you, {}.",
        ["What is my name?", "Do you remember my name?", "Who am I?"],
        "Your name is {}."),
    "color": (
        KINDS["color"],
        ["My favorite color is {}.", "I like the color {}.", "The color that I love is {}.",
         "My house is {}.", "My coat is {}.", "I love the color {}.", "The color of my house is {}.",
         "The color that I like is {}."],
        "I like {} too.",
        ["What is my favorite color?", "Which color do I like?"],
        "Your favorite color is {}."),
    "food": (
        FOODS,
        ["I love to eat {}.", "My favorite food is {}.", "I like {} for dinner.", "I eat a lot of {}.",
         "Give me some {}, please.", "I like to eat {}.", "My dinner is {}.", "I love {} for dinner."],
        "I hope you get some {} today.",
        ["What is my favorite food?", "What do I like to eat?"],
        "You like to eat {}."),
    "city": (
        list(CAPITALS.values()),
        ["I live in {}.", "My home is in {}.", "I come from {}.", "I have a house in {}.", "I am from {}.",
         "My house is in {}.", "My friend and I live in {}.", "I have a home in {}."],
        "{} is a lovely city.",
        ["Where do I live?", "Which city do I live in?"],
        "You live in {}."),
    "pet": (
        PETS,
        ["I have a {}.", "My pet is a {}.", "At home I have a {}.", "There is a {} in my house.",
         "My friend gave me a {}.", "In my house I have a {}.", "Hello, I have a {}.", "My friend is a {}."],
        "How good to have a {} at home.",
        ["Which pet do I have?", "What animal do I have?"],
        "You have a {}."),
}


def telling(rng, memory):
    what = rng.choice(list(MEMORY))
    values, tell, reply, _, _ = MEMORY[what]
    value = rng.choice(values)
    memory[what] = value
    return rng.choice(tell).format(value), cap(reply.format(value)), value


def recalling(rng, memory):
    what = rng.choice(list(memory))
    return rng.choice(MEMORY[what][3]), MEMORY[what][4].format(memory[what]), memory[what]


def manners(rng, memory):
    return rng.choice([
        ("Hello.", "Hello, how can I help you?", "help"),
        ("Good morning.", "Good morning to you.", "morning"),
        ("How are you?", "I am fine, thank you.", "fine"),
        ("Thank you.", "You are welcome.", "welcome"),
        ("Who are you?", "I am a small computer that can talk.", "computer"),
        ("What can you do?", "I can count, compare and remember what you tell me.", "remember"),
        ("Tell me a joke.", "What has four legs and can not walk? A table.", "table"),
        ("Good night.", "Good night, sleep well.", "sleep"),
        ("Goodbye.", "Goodbye, see you soon.", "goodbye"),
    ])


TOPICS = {arithmetic: 10, capitals: 10, opposites: 10, calendar: 10, colors: 8, kinds: 8, counting: 12,
          comparing: 12, repeating: 10, telling: 22, manners: 4}      # topic -> weight


def split_of(sentence):
    """The split that a question sentence belongs to: 80 % train, 5 % validation, 15 % test, by its hash."""
    share = hashlib.sha256(sentence.encode()).digest()[0] / 256          # from 0 to 1
    if share < 0.80:
        return "train"
    if share < 0.85:
        return "validation"
    return "test"


def dialogue(rng, split):
    """Draw one dialogue of a split.

    Its length is Poisson(2) clipped to 1..5, as in section 3 of the paper.

    Returns a list of turns {"topic", "user", "assistant", "answer"}, all texts.
    """
    n, threshold, p = 0, np.exp(-2.0), rng.random()   # Knuth's Poisson sampler
    while p > threshold:
        n, p = n + 1, p * rng.random()
    turns, memory = [], {}
    while len(turns) < min(max(n, 1), 5):
        if memory and rng.random() < 0.4:             # a question about an earlier turn
            topic = recalling
        else:
            topic = rng.choices(list(TOPICS), TOPICS.values())[0]
        before, tries = dict(memory), 0
        user, assistant, answer = topic(rng, memory)
        while topic not in (recalling, manners) and split_of(user) != split:
            memory, tries = dict(before), tries + 1   # a sentence of another split: draw again
            if tries % 500 == 0:                      # this split has none of the topic: another one
                topic = rng.choices(list(TOPICS), TOPICS.values())[0]
            user, assistant, answer = topic(rng, memory)
        turns.append({"topic": topic.__name__, "user": user, "assistant": assistant, "answer": answer})
    return turns


def dialogues(seed, counts):
    """Yield the dialogues of a corpus, in the form that omni/corpus.py makes rows of.

    counts   {split: number of dialogues}

    No split holds a question of another. Dialogues of a split differ, except that the shortest run out of
    texts: one repetition in ten is let through, and another voice says it.
    """
    for split, count in counts.items():
        rng = random.Random(f"{seed} {split}")
        seen = set()
        n = 0
        while n < count:
            turns = dialogue(rng, split)
            key = tuple(turn["user"] for turn in turns)
            if key in seen and rng.random() < 0.9:
                continue
            seen.add(key)
            yield {
                "id": f"{split}-{n:06d}",
                "split": split,
                "voice": draw_voice(rng, split),
                "topics": [turn["topic"] for turn in turns],
                "users": [turn["user"] for turn in turns],
                "replies": [turn["assistant"] for turn in turns],
                "answers": [turn["answer"] for turn in turns],
            }
            n += 1
