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
import re

import numpy as np

from omni.espeak import draw_voice, plain
from tiny.unclear import draw_unclear, voice_of
from tiny.voices import shipped_clips

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
    """The text with a capital first letter, behind a mark if it begins with one."""
    mark = re.match(r"(<\w+>)?", text)[0]
    rest = text[len(mark):]
    return mark + rest[0].upper() + rest[1:]


def stress(text):
    return f"<stress>{text}</stress>"


# Each topic draws (question, reply, answer): the answer is the part of the reply that makes it right. It asks
# in many ways: where training held a few hundred sentences of a topic, stage 1 learned them by heart. Marks
# in a reply say how it is spoken (omni/espeak.py). What answers the question is stressed, so "Paris is the
# capital of France." is said in two ways, and only the question tells which.

def arithmetic(rng, memory):
    x, y = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < 0.5:
        op, z = f"{NUMBERS[x]} plus {NUMBERS[y]}", x + y
    else:
        x, y = max(x, y), min(x, y)
        op, z = f"{NUMBERS[x]} minus {NUMBERS[y]}", x - y
    q = rng.choice(["What is {}?", "How much is {}?", "Tell me, what is {}?", "Can you work out {}?"])
    return q.format(op), f"{cap(op)} is {stress(NUMBERS[z])}.", NUMBERS[z]


def capitals(rng, memory):
    country = rng.choice(list(CAPITALS))
    q = rng.choice(["What is the capital of {}?", "Tell me the capital of {}.", "What capital does {} have?",
                    "Please tell me the capital of {}.", "Can you tell me the capital of {}?",
                    "The capital of {} is what?", "What do you call the capital of {}?",
                    "I love {}, what is the capital?", "Give me the capital of {}."])
    return q.format(country), f"The capital of {country} is {stress(CAPITALS[country])}.", CAPITALS[country]


def cities(rng, memory):
    """What `capitals` teaches, in other words."""
    country = rng.choice(list(CAPITALS))
    city = CAPITALS[country]
    asks, reply, answer = rng.choice([
        (["Which city is the capital of {country}?", "Do you know the capital of {country}?",
          "What city is the capital of {country}?", "Tell me which city is the capital of {country}.",
          "Do you know which city is the capital of {country}?", "Please name the capital of {country}.",
          "Can you name the capital of {country}?", "{country} has which capital?"],
         f"{stress(city)} is the capital of {country}.", city),
        (["{city} is the capital of which country?", "Which country has the capital {city}?",
          "{city} is the capital of what country?", "What country has the capital {city}?",
          "Of which country is {city} the capital?", "Tell me which country has the capital {city}.",
          "Do you know which country has the capital {city}?", "The capital of which country is {city}?"],
         f"{city} is the capital of {stress(country)}.", country),
        (["In which country is {city}?", "Where is the city of {city}?", "{city} is in which country?",
          "Which country is {city} in?", "What country is {city} in?", "Do you know where {city} is?",
          "Tell me which country {city} is in.", "Please tell me where {city} is."],
         f"{city} is in {stress(country)}.", country),
        (["Which city is in {country}?", "Tell me a city in {country}.", "What city is in {country}?",
          "Do you know a city in {country}?", "Can you tell me a city in {country}?",
          "Please name a city in {country}.", "Give me a city in {country}.",
          "Can you name a city in {country}?"],
         f"{stress(city)} is in {country}.", city)])
    return rng.choice(asks).format(city=city, country=country), reply, answer


def opposites(rng, memory):
    word = rng.choice(list(OPPOSITE))
    other = OPPOSITE[word]
    if rng.random() < 0.7:
        q = rng.choice(["What is the opposite of {}?", "Tell me the opposite of {}.",
                        "Which word is the opposite of {}?", "What do you call the opposite of {}?",
                        "What word is the opposite of {}?", "Do you know the opposite of {}?",
                        "Can you tell me the opposite of {}?", "Please tell me the opposite of {}.",
                        "Give me the opposite of {}.", "The opposite of {} is what?",
                        "Tell me which word is the opposite of {}.", "Please name the opposite of {}."])
        return q.format(word), f"{cap(stress(other))} is the opposite of {word}.", other
    q = rng.choice(["{} is the opposite of what?", "{} is the opposite of which word?",
                    "Of what is {} the opposite?", "Of which word is {} the opposite?",
                    "Tell me what {} is the opposite of.", "{} is the opposite of what word?",
                    "Do you know what {} is the opposite of?", "Which word is {} the opposite of?"])
    return cap(q.format(other)), f"{cap(other)} is the opposite of {stress(word)}.", word


def calendar(rng, memory):
    names, kind = rng.choice([(DAYS, "day"), (MONTHS, "month")])
    i, (side, step) = rng.randrange(len(names)), rng.choice([("after", 1), ("before", -1)])
    name, other = names[i], names[(i + step) % len(names)]
    asks, reply, answer = rng.choice([
        (["Which {kind} comes {side} {name}?", "What {kind} comes {side} {name}?",
          "Tell me the {kind} {side} {name}.", "What is the {kind} {side} {name}?",
          "Which {kind} is {side} {name}?", "What comes {side} {name}?", "Tell me what comes {side} {name}.",
          "Do you know which {kind} comes {side} {name}?", "Can you tell me the {kind} {side} {name}?",
          "Please tell me which {kind} comes {side} {name}.", "Give me the {kind} {side} {name}.",
          "Do you know what comes {side} {name}?"],
         f"{stress(other)} comes {side} {name}.", other),
        (["{other} comes {side} which {kind}?", "{other} is the {kind} {side} what?",
          "{other} comes {side} what {kind}?", "{other} is {side} which {kind}?",
          "Tell me, {other} comes {side} which {kind}?", "Tell me which {kind} {other} comes {side}.",
          "Which {kind} does {other} come {side}?", "Do you know which {kind} {other} comes {side}?"],
         f"{other} comes {side} {stress(name)}.", name)])
    return rng.choice(asks).format(kind=kind, side=side, name=name, other=other), reply, answer


def colors(rng, memory):
    thing = rng.choice(list(COLORS))
    color = COLORS[thing]
    if rng.random() < 0.7:
        q = rng.choice(["What color is {}?", "Tell me the color of {}.", "Which color does {} have?",
                        "Do you know the color of {}?"])
        return q.format(a(thing)), f"{cap(a(thing))} is {stress(color)}.", color
    other = rng.choice([x for x in COLORS if COLORS[x] != color])
    q = rng.choice(["What is {}, {} or {}?", "Tell me what is {}, {} or {}."])
    question = q.format(color, *rng.sample([a(thing), a(other)], 2))
    return question, f"{cap(stress(a(thing)))} is {color}.", thing


def kinds(rng, memory):
    kind = rng.choice(["animal", "fruit", "vegetable", "city", "country", "month", "color"])
    thing = rng.choice(KINDS[kind])
    name = a(thing) if kind in ("animal", "fruit", "vegetable") else thing
    q = rng.choice(["What is {}?", "What kind of thing is {}?", "Tell me what {} is.",
                    "Do you know what {} is?", "Can you tell me what {} is?", "Please tell me what {} is.",
                    "Tell me what kind of thing {} is.", "{} is what kind of thing?"])
    return cap(q.format(name)), f"{cap(name)} is {stress(a(kind))}.", kind


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
    word = rng.choice(["bigger", "smaller"])
    most, middle, least = sorted(rng.sample(SIZES, 3), key=SIZES.index, reverse=word == "bigger")
    if rng.random() < 0.7:
        q = rng.choice(["Which is {0}, {1} or {2}?", "What is {0}, {1} or {2}?", "{1} or {2}, which is {0}?",
                        "Tell me which is {0}, {1} or {2}.", "Tell me what is {0}, {1} or {2}.",
                        "{1} or {2}, what is {0}?", "Which one is {0}, {1} or {2}?",
                        "Do you know which is {0}, {1} or {2}?", "Can you tell me what is {0}, {1} or {2}?",
                        "Please tell me which is {0}, {1} or {2}."])
        question = cap(q.format(word, *rng.sample([a(most), a(middle)], 2)))
        return question, f"{cap(stress(a(most)))} is {word} than {a(middle)}.", f"{most} is {word}"
    q = rng.choice(["{0} is {1} than what, {2} or {3}?", "What is {0} {1} than, {2} or {3}?",
                    "Tell me, {0} is {1} than what, {2} or {3}?", "{2} or {3}, what is {0} {1} than?",
                    "Is {0} {1} than {2} or {3}?", "Do you know what {0} is {1} than, {2} or {3}?"])
    question = cap(q.format(a(middle), word, *rng.sample([a(most), a(least)], 2)))
    return question, f"{cap(a(middle))} is {word} than {stress(a(least))}.", f"than {a(least)}"


def statement(rng):
    """A sentence about anything, of which there are thousands: "the red cat is in Paris"."""
    color = rng.choice(KINDS["color"]) + " " if rng.random() < 0.5 else ""
    name, other = rng.sample(NAMES, 2)
    both = f"{name} and {other}"
    animal = f"the {color}{rng.choice(KINDS['animal'])}"
    country, city = rng.choice(list(CAPITALS.items()))
    place = rng.choice([f"in {country}", f"in {city}", f"from {country}", f"from {city}", "at home",
                        "in my house", f"in the house of {name}"])
    food, mood, word = rng.choice(FOODS), rng.choice(MOODS), rng.choice(list(OPPOSITE))
    thing = a(color + rng.choice(list(COLORS)))
    return rng.choice([
        f"{animal} is {mood}", f"{animal} is {place}", f"{animal} is {word}", f"{animal} has {thing}",
        f"my friend {name} is {mood}", f"{name} is {place}", f"{name} has {a(color + rng.choice(PETS))}",
        f"{name} and {animal} are {mood}", f"{both} like {food}", f"{both} are {place}",
        f"{both} eat {food} in {rng.choice(MONTHS)}", f"{name} can count to {rng.choice(NUMBERS)}",
        f"I have {thing} and {a(rng.choice(list(COLORS)))}", f"I like {food} and {rng.choice(FOODS)}",
        f"give {name} some {food}", f"the house of {name} is {word}"])


def repeating(rng, memory):
    """Each word has to be heard. A quarter of what is to be repeated are replies of other topics."""
    said = statement(rng)
    if rng.random() < 0.25:
        topic = rng.choice([arithmetic, cities, opposites, calendar, colors, kinds, counting, comparing])
        said = plain(topic(rng, memory)[1]).rstrip(".")
    q = rng.choice(["Repeat after me: {}.", "Please say: {}.", "Say this: {}."])
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
        ("Hello.", "<merry>Hello, how can I help you?</merry>", "help"),
        ("Good morning.", "<merry>Good morning to you.</merry>", "morning"),
        ("How are you?", "I am fine, thank you.", "fine"),
        ("Thank you.", "You are welcome.", "welcome"),
        ("Who are you?", "I am a small computer that can talk.", "computer"),
        ("What can you do?", "I can count, compare and remember what you tell me.", "remember"),
        ("Tell me a joke.", "<merry>What has four legs and can not walk? A table.</merry>", "table"),
        ("Good night.", "<calm>Good night, sleep well.</calm>", "sleep"),
        ("Goodbye.", "<calm>Goodbye, see you soon.</calm>", "goodbye"),
    ])


def unclear(rng, memory, split):
    return draw_unclear(rng, split), "I did not understand that.", "understand"


TOPICS = {arithmetic: 10, capitals: 4, cities: 10, opposites: 12, calendar: 10, colors: 10, kinds: 8,
          counting: 10, comparing: 16, repeating: 60, telling: 20, manners: 4, unclear: 10}  # topic: weight
SHARED = (recalling, manners, unclear)                # their sentences may occur in any split
COMPOSED = (repeating,)                               # one reply in five is held out: there are thousands


def share(text):
    """A number from 0 to 1, the hash of a text."""
    return hashlib.sha256(text.encode()).digest()[0] / 256


def split_of(question, reply=None):
    """The split that a question belongs to, by its hash: 80 % train, 5 % validation, 15 % test. With a reply:
    one in five is for the test alone, and so is any question that it answers."""
    if reply and share(f"reply {reply}") < 0.2:
        return "test"
    if share(question) < 0.80:
        return "train"
    if share(question) < 0.85:
        return "validation"
    return "test"


def draw_turn(rng, split, topic, memory):
    """Draw a turn of a topic that belongs to a split; `memory` holds what the user has told so far.

    Returns {"topic", "user", "spoken", "assistant", "answer"}, where `spoken` is the reply with its marks;
    None if the split seems to hold none of the topic.
    """
    before = dict(memory)
    for _ in range(500):
        memory.clear()
        memory.update(before)
        if topic is unclear:
            user, spoken, answer = unclear(rng, memory, split)
        else:
            user, spoken, answer = topic(rng, memory)
        turn = {"topic": topic.__name__, "user": user, "spoken": spoken, "assistant": plain(spoken),
                "answer": answer}
        reply = turn["assistant"] if topic in COMPOSED else None
        if topic in SHARED or split_of(user, reply) == split:
            return turn
    memory.clear()
    memory.update(before)


def dialogue(rng, split):
    """Draw one dialogue of a split: a list of turns, see `draw_turn`.

    Its length is Poisson(2) clipped to 1..5, as in section 3 of the paper.
    """
    n, threshold, p = 0, np.exp(-2.0), rng.random()   # Knuth's Poisson sampler
    while p > threshold:
        n, p = n + 1, p * rng.random()
    turns, memory = [], {}
    while len(turns) < min(max(n, 1), 5):
        if memory and rng.random() < 0.6:             # a question about an earlier turn
            topic = recalling
        else:
            topic = rng.choices(list(TOPICS), TOPICS.values())[0]
        turn = draw_turn(rng, split, topic, memory)
        if turn:                                      # a small split may hold none of a topic
            turns.append(turn)
    return turns


def dialogues(seed, counts, voices=(), people=True):
    """Yield the dialogues of a corpus, in the form that omni/corpus.py makes rows of.

    counts   {split: number of dialogues}
    voices   whose voice asks; none: one of the split, see `draw_voice`
    people   let the shipped clips of people's voices (tiny/voices.py) ask four in five of the training
             questions of which there are some

    No split holds a question of another. Dialogues of a split differ, except that the shortest run out of
    texts: one repetition in ten is let through, and another voice says it.
    """
    clips = {}                                        # text -> the voices of its clips
    if people and not voices:
        for text, voice in shipped_clips():
            clips.setdefault(text, []).append(voice)
    for split, count in counts.items():
        rng, people_rng = random.Random(f"{seed} {split}"), random.Random(f"{seed} {split} people")
        seen = set()
        n = 0
        while n < count:
            turns = dialogue(rng, split)
            key = tuple(turn["user"] for turn in turns)
            if key in seen and rng.random() < 0.9:
                continue
            seen.add(key)
            voice = draw_voice(rng, split)
            if voices:
                voice = rng.choice(voices)
            asking = [voice_of(rng, turn["user"], split) or voice for turn in turns]
            if split == "train":
                for i, turn in enumerate(turns):
                    if turn["user"] in clips and people_rng.random() < 0.8:
                        asking[i] = people_rng.choice(clips[turn["user"]])
            yield {
                "id": f"{split}-{n:06d}",
                "split": split,
                "voice": voice,
                "voices": asking,
                "topics": [turn["topic"] for turn in turns],
                "users": [turn["user"] for turn in turns],
                "replies": [turn["assistant"] for turn in turns],
                "spoken": [turn["spoken"] for turn in turns],
                "answers": [turn["answer"] for turn in turns],
            }
            n += 1
