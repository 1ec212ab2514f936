"""
A second language for the embedded world: German questions and answers, as a corpus of text.

Why: what does it take to teach the chatbot another language? reference/your_data.md answers by doing it, and
needs dialogues for that. These are single turns, about what tiny/world.py talks about too: sums, opposites,
capitals, colors, days and months, counting, and repeating a sentence.

How: `python -m tiny.german` writes them as the JSONL file that config/data_text.py describes. Each question
occurs in one line; whether it is held out is decided by its id, in data.py as everywhere.
"""
import itertools
import json
import os
import random
from collections import Counter
from dataclasses import dataclass

from omni.configure import configure, fail
from omni.files import replace_file

NUMBERS = "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf".split()
DAYS = "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag".split()
MONTHS = "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split()
CAPITALS = {"Frankreich": "Paris", "Italien": "Rom", "Spanien": "Madrid", "Deutschland": "Berlin",
            "England": "London", "Japan": "Tokio", "China": "Peking", "Russland": "Moskau",
            "Ägypten": "Kairo", "Griechenland": "Athen", "Portugal": "Lissabon", "Österreich": "Wien",
            "Norwegen": "Oslo", "Polen": "Warschau", "Dänemark": "Kopenhagen", "Schweden": "Stockholm"}
OPPOSITES = [("groß", "klein"), ("heiß", "kalt"), ("alt", "jung"), ("links", "rechts"), ("müde", "wach"),
             ("früh", "spät"), ("schön", "hässlich"), ("stark", "schwach"), ("hart", "weich"),
             ("hell", "dunkel"), ("reich", "arm"), ("süß", "sauer"), ("laut", "leise"),
             ("leicht", "schwer")]
COLORS = {"die Banane": "gelb", "die Zitrone": "gelb", "die Tomate": "rot", "die Kirsche": "rot",
          "der Frosch": "grün", "das Blatt": "grün", "die Gurke": "grün", "der Schnee": "weiß",
          "der Schwan": "weiß", "der Elefant": "grau", "der Bär": "braun", "die Kartoffel": "braun",
          "der Himmel": "blau", "das Meer": "blau", "die Nacht": "schwarz", "die Maus": "grau"}
WHO = ("der Hund,die Katze,das Pferd,der Bär,die Kuh,das Schaf,der Vogel,die Maus,das Kind,der König,"
       "die Tochter,das Mädchen,der Bruder,die Köchin").split(",")
KINDS = ("kleine große alte junge schöne müde weiße schwarze braune schnelle starke arme "
         "fröhliche").split()
DOES = "schläft läuft singt wartet lacht spielt träumt kocht tanzt liest".split()
WHEN = "heute,morgen,immer,gern,hier,draußen,leise,oft,zu Hause,nachts".split(",")
OPENINGS = ("", "Bitte, ", "Hallo, ", "Also, ", "Du, ")


def cap(text):
    return text[0].upper() + text[1:]


def sums():
    for a, b in itertools.product(range(11), range(11)):
        for sign, c in (("plus", a + b), ("minus", a - b)):
            if 0 <= c < len(NUMBERS):
                task = f"{NUMBERS[a]} {sign} {NUMBERS[b]}"
                reply = f"{cap(task)} ist {NUMBERS[c]}."
                for form in ("was ist {}?", "wie viel ist {}?", "was ergibt {}?", "rechne {}.",
                             "sag mir, was {} ist."):
                    yield form.format(task), reply


def opposites():
    for a, b in OPPOSITES + [(b, a) for a, b in OPPOSITES]:
        for form in ("was ist das Gegenteil von {}?", "wie heißt das Gegenteil von {}?",
                     "nenne mir das Gegenteil von {}.", "sag mir, was das Gegenteil von {} ist."):
            yield form.format(a), f"Das Gegenteil von {a} ist {b}."


def capitals():
    for country, city in CAPITALS.items():
        for form in ("was ist die Hauptstadt von {}?", "wie heißt die Hauptstadt von {}?",
                     "nenne mir die Hauptstadt von {}.", "sag mir, wie die Hauptstadt von {} heißt."):
            yield form.format(country), f"Die Hauptstadt von {country} ist {city}."


def colors():
    for thing, color in COLORS.items():
        for form in ("welche Farbe hat {}?", "was für eine Farbe hat {}?", "sag mir, welche Farbe {} hat.",
                     "weißt du, welche Farbe {} hat?"):
            yield form.format(thing), f"{cap(thing)} ist {color}."


def calendar():
    for what, names in (("welcher Tag", DAYS), ("welcher Monat", MONTHS)):
        for before, after in zip(names, names[1:] + names[:1]):
            for form in ("{} kommt {}?", "sag mir, {} {} kommt.", "weißt du, {} {} kommt?"):
                yield form.format(what, f"nach {before}"), f"Nach {before} kommt {after}."
                yield form.format(what, f"vor {after}"), f"Vor {after} kommt {before}."


def counting():
    for a, b in itertools.permutations(range(len(NUMBERS)), 2):
        if abs(a - b) < 5:
            said = NUMBERS[a:b + 1] if a < b else NUMBERS[b:a + 1][::-1]
            for form in ("zähle von {} bis {}.", "kannst du von {} bis {} zählen?",
                         "zähl mir von {} bis {}."):
                yield form.format(NUMBERS[a], NUMBERS[b]), cap(", ".join(said)) + "."


def repeating():
    for who, kind, does, when in itertools.product(WHO, KINDS, DOES, WHEN):
        article, noun = who.split()
        said = f"{article} {kind} {noun} {does} {when}."
        for form in ("sprich mir nach: {}", "wiederhole: {}", "sag: {}"):
            yield form.format(said), cap(said)


# topic -> (its questions with their replies, how many lines of it at most)
TOPICS = {"sums": (sums, 1100), "opposites": (opposites, 500), "capitals": (capitals, 320),
          "colors": (colors, 320), "calendar": (calendar, 500), "counting": (counting, 500),
          "repeating": (repeating, 2000)}


def dialogues(seed, share=1.0):
    """The rows of the corpus in random order: {"id": "sums-7", "users": [question], "replies": [reply]}.

    share    of the rows of each topic, 0 to 1
    A question occurs once; a sentence that is to be repeated, too, so a held-out one was never said.
    """
    rng = random.Random(seed)
    rows = []
    for topic, (draw, most) in TOPICS.items():
        pairs = [(cap(opening + question), reply) for question, reply in draw() for opening in OPENINGS]
        rng.shuffle(pairs)
        if topic == "repeating":
            pairs = list({reply: (question, reply) for question, reply in pairs}.values())
        for n, (question, reply) in enumerate(pairs[:round(most * share)]):
            rows.append({"id": f"{topic}-{n}", "users": [question], "replies": [reply]})
    rng.shuffle(rows)
    return rows


@dataclass(frozen=True)
class GermanConfig:
    path: str = "corpus/german.jsonl"  # where the dialogues go
    share: float = 1.0                 # of the dialogues, for a smaller corpus
    seed: int = 1337                   # of their order and choice


def main():
    cfg = configure(GermanConfig)
    rows = dialogues(cfg.seed, cfg.share)
    try:
        os.makedirs(os.path.dirname(cfg.path) or ".", exist_ok=True)
        replace_file(cfg.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as e:
        fail(f"--path {cfg.path} cannot be written ({e.strerror}); choose another")
    count = Counter(row["id"].partition("-")[0] for row in rows)
    texts = [text for row in rows for text in row["users"] + row["replies"]]
    words = {word.strip(".,:?").lower() for text in texts for word in text.split()}
    print(f"{cfg.path}: {len(rows)} dialogues of {len(words)} different words; "
          + ", ".join(f"{topic} {n}" for topic, n in count.items()))


if __name__ == "__main__":
    main()
