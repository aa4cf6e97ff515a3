"""What documents are made of: keys, values and coded words. The splits have no word in common.

Every list is dealt out to the splits word by word, and coded words of the two splits begin with other syllables.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass

from apb_ds.tasks.synthetic.draws import Draws

SPLITS = ("train", "eval")
VALUE_DIGITS = 7
CODED_LETTERS = 6
UUID_PARTS = (8, 4, 4, 4, 12)
UUID_LETTERS = sum(UUID_PARTS) + len(UUID_PARTS) - 1
UPPER, LOWER = string.ascii_uppercase, string.ascii_lowercase
# How often a word may come out that is there already, before there are taken to be no others.
MAX_REPEATS = 1000

ADJECTIVES = """
    amber ancient azure bashful bitter blunt bold brave brazen brief bright brisk broad brown bumpy calm candid
    careful chilly clever coarse cosy crimson crisp crooked curious curly damp daring dapper dense distant dizzy
    drowsy dusty eager earnest elder elegant faded faint fancy fearless feeble fierce flimsy fluffy fond formal
    fragile frank frosty gentle giddy gilded glad gleaming gloomy golden graceful grand grateful gritty hardy hasty
    hazy hearty hollow honest humble hungry icy idle ivory jagged jolly keen kindly lanky lavish leafy lively lofty
    lonely lucid lumpy marble mellow merry mighty misty modest mossy narrow neat nimble noble olive orderly pale
    patient pearly pensive placid plain playful plucky polite proud quaint quick quiet rapid restless rosy rugged
    rustic salty sandy scarlet serene shaggy shallow sharp shiny silent silver sincere sleepy slender sly smooth
    sober solemn spare spicy spotted stately steady steep stern stout striped sturdy subtle sunny swift tame tawny
    tender thrifty tidy timid tranquil trusty upright vivid wary weary wiry witty woolly young zesty
""".split()  # noqa: SIM905 (a list of words reads better as text)
NOUNS = """
    acorn almond anchor anvil apron arrow badger balcony ballad banjo barrel basket beacon beetle bellows bench blanket
    bobbin bottle bramble bridge broom brush bucket buckle button cabin cactus candle canoe carpet cart castle cedar
    chimney chisel cider clock clover cobbler compass copper cork cottage cradle cricket crystal curtain cushion dagger
    daisy desk dolphin donkey drawer drum easel engine falcon feather fence fiddle finch flask flute fountain fox
    funnel garden garnet gate glacier glove goblet goose granite grove guitar hammer hammock harbour harp hatchet
    hazel hedge helmet heron hinge honey hornet inkwell island jacket jasmine jigsaw kettle kite ladder lagoon lantern
    lark lattice ledger lemon lever lighthouse lily lobster locket loom lynx magnet mallet maple marigold mast meadow
    medal mirror mitten moth mural napkin needle nettle nutmeg oar orchard otter oven owl paddle parcel parrot pebble
    pelican pepper piano pillar pillow pine pistachio plough plum pocket poppy pulley puzzle quilt quiver rabbit raft
    rake raven reed ribbon robin rocket rudder saddle sail salmon satchel saucer scarf scissors shovel shutter sickle
    sled slipper sparrow spindle spoon squirrel stool stove sundial swallow tablet tankard teapot thimble thistle
    throne ticket timber toaster torch trellis trumpet tulip tunnel turnip turtle umbrella urn valley vase velvet vessel
    violin wagon walnut walrus wharf wheel whistle willow windmill wizard wombat wrench yacht zither
""".split()  # noqa: SIM905 (a list of words reads better as text)
SYLLABLES = tuple(consonant + vowel for vowel in "aeiou" for consonant in "bdfgklmnprstvz")


def dealt(items: list[str] | tuple[str, ...], split: str) -> tuple[str, ...]:
    """Return the items that belong to a split: every other one."""
    return tuple(items[SPLITS.index(split) :: len(SPLITS)])


ADJECTIVES_OF = {split: dealt(ADJECTIVES, split) for split in SPLITS}
NOUNS_OF = {split: dealt(NOUNS, split) for split in SPLITS}
FIRST_SYLLABLES_OF = {split: dealt(SYLLABLES, split) for split in SPLITS}


def coded_word(draws: Draws, split: str) -> str:
    """Return a made-up word of six letters, such as ``kavomi``; none is a part of another."""
    return draws.choose(FIRST_SYLLABLES_OF[split]) + draws.choose(SYLLABLES) + draws.choose(SYLLABLES)


def thing(draws: Draws, split: str) -> str:
    """Return a key in words, such as ``brisk lantern of Kavomi``."""
    words = draws.choose(ADJECTIVES_OF[split]), draws.choose(NOUNS_OF[split])
    return f"{words[0]} {words[1]} of {coded_word(draws, split).capitalize()}"


def hyphenated(draws: Draws, split: str) -> str:
    """Return a key in words, such as ``brisk-lantern``, sometimes with a third word."""
    words = [draws.choose(ADJECTIVES_OF[split]), draws.choose(NOUNS_OF[split])]
    if draws.below(4) == 0:
        words.append(draws.choose(NOUNS_OF[split]))
    return "-".join(words)


@dataclass(frozen=True)
class Spelling:
    """What made-up words look like, those of one document alike.

    Attributes
    ----------
    kind : ``digits``, ``upper`` and ``lower`` (random letters), ``mixed`` (a letter and digits), ``coded`` (syllables),
        ``noun``
    length : letters, where the kind leaves it open
    """

    kind: str
    length: int

    def draw(self, draws: Draws, split: str) -> str:
        """Return a word."""
        if self.kind == "digits":
            return draws.choose("123456789") + _letters(draws, "0123456789", self.length - 1)
        if self.kind == "mixed":
            return draws.choose(LOWER) + _letters(draws, "0123456789", self.length - 1)
        if self.kind == "coded":
            return coded_word(draws, split)
        if self.kind == "noun":
            return draws.choose(NOUNS_OF[split]) + draws.choose(NOUNS_OF[split])
        return _letters(draws, UPPER if self.kind == "upper" else LOWER, self.length)


def draw_spelling(draws: Draws, kinds: tuple[str, ...]) -> Spelling:
    """Return one of these kinds, with a length."""
    kind = draws.choose(kinds)
    return Spelling(kind, 5 + draws.below(3 if kind == "digits" else 2))


def _letters(draws: Draws, alphabet: str, num: int) -> str:
    return "".join(draws.choose(alphabet) for _ in range(num))


def number(draws: Draws) -> str:
    """Return a number of seven digits, each number as likely as another."""
    smallest = 10 ** (VALUE_DIGITS - 1)
    return str(smallest + draws.below(9 * smallest))


def uuid(draws: Draws) -> str:
    """Return 32 random hexadecimal digits, grouped as in a UUID."""
    return "-".join("".join(draws.choose("0123456789abcdef") for _ in range(part)) for part in UUID_PARTS)


class Distinct:
    """A growing list of texts, all of them different: what is at an index never depends on who asked for what.

    Parameters
    ----------
    draw : returns a text, perhaps one that was drawn before
    """

    def __init__(self, draw: Callable[[], str]) -> None:
        self._draw = draw
        self._items: list[str] = []
        self._seen: set[str] = set()

    def __getitem__(self, index: int) -> str:
        while len(self._items) <= index:
            self._items.append(self._new())
        return self._items[index]

    def _new(self) -> str:
        for _ in range(MAX_REPEATS):
            item = self._draw()
            if item not in self._seen:
                self._seen.add(item)
                return item
        raise ValueError(
            f"after {len(self._items)} different words, such as {self._items[0]!r}, there are hardly any others; "
            "lower task.num_tokens."
        )
