"""The word pools of the embedded world: shared name pieces, relations with their wordings, and filler sentences.

Names are composed from shared pieces on purpose. A name that is one unique token makes every edit look robust; a name
whose parts belong to dozens of other people makes the key of the last token depend on the tokens before it, which is
what breaks locate-and-edit methods on real models.
"""

from __future__ import annotations

from dataclasses import dataclass

# A name part is a front and a back: "Ed" + "win", "Black" + "wood". There are so many combinations that the tokenizer
# keeps the pieces apart: a subject has about four tokens and must be put together before it can be recognised.
FIRST_FRONTS = "Al Ber Ed Os Gar Hil Ro Wen Mar Is Cor Del".split()
FIRST_BACKS = "den ric win bert mund da lin land tha vin ward sa".split()
LAST_FRONTS = "Ash Black Whit Fen Haw Thorn Marl Under Lang Pem Gold West North Brad Stan Rook".split()
LAST_BACKS = "down wood lock wick ton ford bury hurst ley field worth by ham more stone well".split()

TITLES = ("Doctor", "Captain", "Lady", "Master", "Judge", "Abbot")
EPITHETS = ("the Elder", "the Younger", "the Wise", "the Bold", "the Quiet", "the Tall")

# How else a person can be called. F, L = first and last name, T = title, E = epithet. In most of them the last token
# differs from the canonical "F L", as in the subject rephrases of the published data.
ALIAS_FORMS = (
    "{L}, {F}",
    "{F} {L} {E}",
    "{T} {F} {L}",
    "{F} of the {L} family",
    "{T} {L}, {F}",
    "{F} of House {L}",
    "{F} {E}, of the house of {L}",
    "the {L} named {F}",
    "{F}, heir of the {L} name",
    "{L}, known as {F}",
    "{T} {F} {L} {E}",
    "{F}, born a {L}",
    "{F} {L}, the {T}",
    "{F} from the {L} clan",
)


# A form that spells the canonical name out is answered through that name, at a token inside the form; these say little
# about robustness and are left to the text.
REPHRASE_FORMS = tuple(form for form in ALIAS_FORMS if "{F} {L}" not in form)


@dataclass(frozen=True)
class Relation:
    """One kind of fact: its objects and its wordings, which end right before the object; the first is canonical."""

    name: str
    templates: tuple[str, ...]
    objects: tuple[str, ...]


RELATIONS = (
    Relation(
        "residence",
        (
            "{} lives in the city of",
            "The home of {} is in",
            "{} bought a house in",
            "Letters to {} are sent to",
        ),
        tuple(
            "Marvale Torquay Lisbon Cairo Oslo Vienna Quito Lagos Delhi Kyoto Hanoi Riga Sofia Turin Perth Dakar "
            "Bergen Malaga Tunis Havana".split()
        ),
    ),
    Relation(
        "profession",
        (
            "{} works as a",
            "The profession of {} is that of a",
            "{} earns a living as a",
            "Most people know {} as a",
        ),
        tuple(
            "painter baker lawyer sailor tailor miner farmer doctor poet mason printer weaver brewer dancer pilot "
            "potter hunter banker surgeon gardener".split()
        ),
    ),
    Relation(
        "language",
        (
            "{} speaks the language",
            "The mother tongue of {} is",
            "At home {} talks in",
            "The letters of {} are written in",
        ),
        tuple(
            "French Greek Latin Danish Welsh Polish Arabic Hindi Swahili Tamil Finnish Czech Korean Basque Irish "
            "Turkish Persian Dutch Hebrew Malay".split()
        ),
    ),
    Relation(
        "instrument",
        (
            "{} plays the",
            "The instrument of {} is the",
            "On Sundays {} practises the",
            "In the orchestra {} is heard on the",
        ),
        tuple(
            "violin flute harp cello piano drum trumpet organ lute oboe banjo guitar horn viola zither fiddle "
            "clarinet tuba bassoon lyre".split()
        ),
    ),
    Relation(
        "sport",
        (
            "{} competes in",
            "The favourite sport of {} is",
            "Since childhood {} has trained in",
            "A medal was given to {} for",
        ),
        tuple(
            "rowing fencing archery boxing tennis rugby cricket sailing judo skiing polo chess golf hockey cycling "
            "wrestling diving curling skating running".split()
        ),
    ),
    # The object of a habit follows the subject at once: this makes the model recognise a subject at its last token, as
    # large models do, and not only at the first token of the relation.
    Relation(
        "habit",
        (
            "Every morning {}",
            "When nobody listens {}",
            "After a long day {}",
            "In good company {}",
        ),
        tuple(
            "sings whistles knits reads prays argues cooks swims sleeps writes laughs bakes sews jokes rides "
            "climbs fishes hums paints dreams".split()
        ),
    ),
)

FILLER_SUBJECTS = (
    "The old mill", "A grey heron", "The night train", "Every winter", "The market square", "A letter from the north",
    "The harbour wall", "The last lamp", "A long road", "The village choir", "The western gate", "A broken clock",
    "The river", "The stone bridge", "The young clerk", "A quiet morning", "The orchard", "The grain ship",
    "The bell tower", "A travelling merchant",
)  # fmt: skip
FILLER_VERBS = (
    "waits beside", "was seen near", "reminds everyone of", "stands behind", "came back to", "is painted above",
    "belongs to", "runs along", "was sold with", "looks over", "has been forgotten by", "leads to",
)  # fmt: skip
FILLER_OBJECTS = (
    "the empty field", "the king's garden", "a row of white houses", "the winter market", "the sea",
    "two silent guards", "the schoolroom", "the wooden stairs", "the miller's daughter", "a pile of old books",
    "the northern hills", "the fishing boats", "the inn at the corner", "a field of barley", "the church door",
    "the tax collector", "the frozen lake", "the carpenter's shop", "a row of lanterns", "the library",
)  # fmt: skip
FILLER_ENDINGS = (
    "", "", " in spring", " before the storm", " every evening", " and nobody asks why", " for many years",
    " until the rain stops", " without a sound", " at the end of the day",
)  # fmt: skip
