"""
What is not of the embedded world: questions about something else, other languages, and sounds.

Why: a model that has only heard what it can answer answers everything, also a cough. So one turn in twelve
is something that it cannot know, and the reply is "I did not understand that."

How: `draw_unclear` draws a text, `voice_of` the voice that says it. A sound is written as its name in
brackets, such as "(hum)". Test turns are of sentences, languages and kinds of sound that training does not
hold.
"""
from omni.espeak import draw_voice
from tiny.sounds import SOUNDS

WORDS = {
    "thing": "violin window bicycle newspaper mountain river kitchen telephone candle umbrella hammer "
             "blanket engine carpet mirror basket guitar rocket bottle jacket camera ladder statue garden "
             "bridge hospital station library museum tunnel volcano keyboard pillow wallet helmet".split(),
    "place": "Brazil Canada India Australia Mexico Chicago Boston Sweden Turkey Argentina Sydney Toronto "
             "Havana Iceland Peru Texas Manila Jamaica".split(),
    "person": "Shakespeare Mozart Napoleon Einstein Columbus Picasso Beethoven Lincoln Gandhi Newton".split(),
    "task": ["fix a broken bicycle", "bake an apple pie", "learn to swim", "write a long letter",
             "paint the ceiling", "build a wooden table", "get to the airport", "lose some weight",
             "grow roses", "sleep better", "change a tire", "cook an omelette", "clean a carpet",
             "invest my money", "tie a knot", "sharpen a knife"],
    "quality": "expensive heavy beautiful dangerous famous noisy fragile popular comfortable ancient shiny "
               "crowded".split(),
}
FRAMES = {
    "train": [
        "Who wrote the book about the {thing}?", "How do I {task}?", "Where can I buy a {thing}?",
        "Can you help me {task}?", "Why is the {thing} so {quality}?", "When did {person} visit {place}?",
        "How far is it to {place}?", "What is the capital of {place}?", "What color is the {thing}?",
        "What is the weather like in {place}?", "Play some music by {person}.", "Who was {person}?",
        "Turn off the {thing} in the bedroom.", "Set an alarm for half past six.",
        "Is the {thing} {quality}?", "I want to {task} this weekend.",
        "My brother broke the {thing} yesterday.",
        "How many people live in {place}?", "What does {quality} mean?", "Read me the news about {place}.",
        "Is a {thing} {quality} or {quality}?", "They sold the {quality} {thing} last summer.",
        "Please call my doctor.", "Could you translate {quality} into Latin?",
        "Which {thing} should I choose?",
        "The {thing} is next to the {thing}.", "What is the opposite of a {thing}?",
        "We walked from the {thing} to the {thing}.", "It will probably rain in {place}.",
        "Tell me about the {thing} of {person}."],
    "test": [
        "Where did I put the {thing}?", "How old was {person} when he moved to {place}?",
        "Should I take a {thing} to {place}?", "Remind me to {task} tomorrow.",
        "Which airline flies to {place}?", "Why would anybody {task}?",
        "Nobody has seen the {quality} {thing} since March the ninth.",
        "Order a {quality} {thing} for my wife.",
        "What did {person} think about the {thing}?", "Explain how a {thing} works."],
}
LANGUAGES = {                                         # espeak-ng's name of a language -> sentences
    "train": {
        "de": ["Wie komme ich zum Bahnhof?", "Das Wetter ist heute sehr schlecht.",
               "Kannst du mir bitte helfen?", "Ich habe gestern ein neues Fahrrad gekauft.",
               "Was kostet das Brot?"],
        "fr": ["Je voudrais un billet pour Lyon.", "Il fait beau aujourd'hui.", "Quelle heure est-il?",
               "Mon fils joue dans le jardin.", "Combien coûte cette voiture?"],
        "es": ["¿Dónde está la biblioteca?", "Mañana vamos a la playa.", "Quiero una taza de café.",
               "Mi hermana trabaja en un hospital.", "No sé qué hora es."],
        "it": ["Vorrei prenotare un tavolo.", "Domani andiamo al mare.", "Che cosa fai stasera?",
               "La mia macchina è rotta.", "Non capisco questa parola."],
        "nl": ["Waar is het station?", "Ik heb vandaag geen tijd.", "Hoeveel kost deze fiets?",
               "Mijn broer woont in een groot huis."],
        "pl": ["Gdzie jest dworzec?", "Dzisiaj jest bardzo zimno.", "Proszę o rachunek.",
               "Moja siostra czyta książkę."],
        "fi": ["Missä on rautatieasema?", "Tänään on kaunis päivä.", "Haluaisin kupin kahvia."],
    },
    "test": {
        "pt": ["Onde fica a estação?", "Amanhã vou visitar a minha avó.", "O menino comeu uma maçã.",
               "Quanto custa este livro?"],
        "sv": ["Var ligger järnvägsstationen?", "Jag vill ha en kopp kaffe.", "Det regnar mycket i dag."],
        "tr": ["İstasyon nerede?", "Bugün hava çok güzel.", "Bir bardak su istiyorum."],
        "hu": ["Hol van a pályaudvar?", "Ma nagyon szép idő van.", "Kérek egy pohár vizet."],
    },
}
LANGUAGE_OF = {text: language for spoken in LANGUAGES.values() for language, texts in spoken.items()
               for text in texts}


def draw_unclear(rng, split):
    """Draw what the model cannot understand: a sentence in English or in another language, or "(a sound)"."""
    held_out = "test" if split == "test" else "train"
    kind = rng.choices(["english", "foreign", "sound"], [65, 17, 18])[0]
    if kind == "sound":
        return f"({rng.choice(SOUNDS[held_out])})"
    if kind == "foreign":
        languages = LANGUAGES[held_out]
        return rng.choice(languages[rng.choice(list(languages))])
    text = rng.choice(FRAMES[held_out])
    for name, words in WORDS.items():
        while f"{{{name}}}" in text:
            text = text.replace(f"{{{name}}}", rng.choice(words), 1)
    return text


def voice_of(rng, text, split):
    """The voice of a text that `draw_unclear` drew; None for English, which any voice speaks.

    "de+f3:150:40"         a language, and then as omni/espeak.py writes voices
    "sound/hum:1.5:1234"   a sound of tiny/sounds.py, its seconds and its seed
    """
    if text.startswith("("):
        return f"sound/{text[1:-1]}:{rng.uniform(0.8, 4):.1f}:{rng.randrange(10 ** 6)}"
    if text in LANGUAGE_OF:
        return draw_voice(rng, split, [LANGUAGE_OF[text]])
