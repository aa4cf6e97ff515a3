"""Sentences that have nothing to do with what is asked: prose from templates, or the same few over and over."""

from __future__ import annotations

from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.words import ADJECTIVES_OF, NOUNS_OF, SPLITS, dealt

FILLERS = ("prose", "noise")

ROLES = """
    baker blacksmith captain carpenter clerk cook dentist doctor driver farmer fisherman gardener glazier grocer
    guide inspector janitor judge librarian mason mayor miller musician nurse painter pilot plumber porter postman
    potter sailor sculptor shepherd surveyor tailor teacher waiter watchmaker weaver writer
""".split()  # noqa: SIM905 (a list of words reads better as text)
PLACES = """
    academy arcade attic avenue bakery barn boathouse brewery cafe canteen cellar chapel courtyard depot dairy dock
    factory ferry forge gallery greenhouse hall hospital hotel inn kitchen laboratory library market mill museum
    office park pier playground quarry school square stable station studio theatre tavern terrace tower village
    warehouse workshop yard
""".split()  # noqa: SIM905 (a list of words reads better as text)
TIMES = (
    "after breakfast",
    "after the rain",
    "around noon",
    "as the bells rang",
    "at dawn",
    "at dusk",
    "before lunch",
    "before sunrise",
    "during the storm",
    "during the holidays",
    "early in the week",
    "early one morning",
    "in autumn",
    "in spring",
    "late at night",
    "late in the season",
    "on a Monday",
    "on a Thursday",
    "on the last day of the fair",
    "on the first warm day",
    "over the weekend",
    "once a month",
    "towards evening",
    "while it snowed",
)
TEMPLATES = (
    "The {role} left the {noun} by the door of the {place} {time}.",
    "Nobody at the {place} could say who had painted the {adjective} {noun}.",
    "{Time}, the {role} walked from the {place} to the {place2} without a word.",
    "A letter about the {noun} lay open on the table of the {role}.",
    "The {place} was closed for repairs, so the {role} waited outside.",
    "People said that the {role} had once owned a {noun} made of glass.",
    "The old {noun} in the {place} needed a new coat of varnish.",
    "Two children carried the {adjective} {noun} across the {place} {time}.",
    "The {role} and the {role2} argued about the price of the {noun}.",
    "It rained for so long that the path behind the {place} turned to mud.",
    "Every visitor to the {place} was shown the {adjective} {noun} first.",
    "The {role} kept a diary in which the weather took up most of the room.",
    "{Time}, the lamps in the {place} were lit one after another.",
    "The {role} had learned the trade from an uncle who was a {role2}.",
    "A smell of fresh bread came from the {place} next to the {place2}.",
    "The {adjective} {noun} was much heavier than the {role} had expected.",
    "Somebody had left the windows of the {place} open {time}.",
    "The {role} counted the chairs in the {place} and found that one was missing.",
    "According to the {role}, the best view of the hills is from the {place}.",
    "The {noun} fell from the shelf {time} and rolled under the stove.",
    "In the {place}, a {role} was teaching beginners how to mend a {noun}.",
    "There was a long queue in front of the {place} {time}.",
    "The {role} promised to bring back the {adjective} {noun} within a week.",
    "No one had seen the {role} since the concert in the {place}.",
    "The {place} smelled of paint, soap and wet wool.",
    "A stray dog slept beside the {noun} while the {role} read the paper.",
    "The {role} bought the {noun} at the {place} and sold it again {time}.",
    "Behind the {place} there is a narrow lane where the {role} keeps bees.",
    "The {role} wrote a short speech for the opening of the {place}.",
    "{Time}, the {adjective} {noun} was moved from the {place} to the {place2}.",
    "The road to the {place} was so icy that the {role} turned back.",
    "A {role} from the next town asked whether the {noun} was for sale.",
    "The {role} tuned the piano in the {place} and stayed for supper.",
    "Most of the {place} burned down long ago, but the {noun} was saved.",
    "The {role} could not remember where the {adjective} {noun} had come from.",
    "When the {role} laughed, everybody in the {place} laughed as well.",
    "The map on the wall of the {place} showed rivers that have since dried up.",
    "The {role} put the {noun} on a cart and covered it with a sheet.",
    "{Time}, a cold wind blew through the {place}.",
    "The {role2} was late, and the {role} drank the tea alone.",
    "The {noun} had been repaired so often that little of it was original.",
    "A photograph of the {role} hung in the hallway of the {place}.",
    "The {role} swept the floor of the {place} {time}.",
    "Strangers often mistook the {place} for the {place2} across the street.",
    "The {adjective} {noun} won a small prize at the village fair.",
    "The {role} spoke so softly that the {role2} had to lean closer.",
    "Snow slid off the roof of the {place} and buried the {noun}.",
    "The {role} would rather mend a {noun} than buy a new one.",
    "{Time}, the {role} opened the gate and let the geese out.",
    "The {place} had a clock that was always a little slow.",
    "A basket of apples stood next to the {noun} in the {place}.",
    "The {role} whistled a tune that nobody in the {place} knew.",
    "The {role} lent the {adjective} {noun} to the {role2} {time}.",
    "From the {place} one can hear the trains, but not the sea.",
    "The {noun} was wrapped in brown paper and tied with string.",
    "The {role} planted beans along the wall of the {place}.",
    "Hardly anybody noticed when the {adjective} {noun} was taken away.",
    "The {role} took the long way home, past the {place} and the {place2}.",
    "{Time}, the {role} found a {noun} in the grass.",
    "The stairs of the {place} creak so loudly that the {role} wakes up.",
    "The {role} had never liked the {adjective} {noun} and said so.",
    "A meeting was held in the {place}, and the {role} took the minutes.",
    "The {role2} borrowed an umbrella from the {role} {time}.",
    "The {noun} on the sign of the {place} was faded by the sun.",
    "The {role} believed that a good {noun} should last a lifetime.",
    "Tea was served in the {place} while the {role} told a story.",
    "The {adjective} {noun} stood in the rain until the {role} fetched it.",
    "The {role} measured the room and shook a doubtful head.",
    "The floor of the {place} was strewn with straw {time}.",
    "The {role} came to the {place} for work and stayed for the company.",
    "The {place2} is older than the {place}, as every {role} knows.",
    "{Time}, the {role} sharpened the tools and oiled the hinges.",
    "The {noun} was too wide for the door, so it stayed in the yard.",
    "Nothing much happened at the {place} {time}.",
    "The {role} hummed while the {role2} stacked the firewood.",
    "The {adjective} {noun} was the only thing that the thieves had left.",
)
NOISE = {
    "train": (
        "The river runs to the sea.",
        "The road goes over the hill.",
        "Birds sit on the wire.",
        "A boat comes in and a boat goes out.",
    ),
    "eval": (
        "The snow lies on the roof.",
        "The wind moves the leaves.",
        "Sheep stand in the field.",
        "One door opens and one door shuts.",
    ),
}
TEMPLATES_OF = {split: dealt(TEMPLATES, split) for split in SPLITS}
ROLES_OF = {split: dealt(ROLES, split) for split in SPLITS}
PLACES_OF = {split: dealt(PLACES, split) for split in SPLITS}
TIMES_OF = {split: dealt(TIMES, split) for split in SPLITS}


class Filler:
    """An endless sequence of sentences; the first ones are the same however many are asked for.

    Parameters
    ----------
    kind : ``prose`` or ``noise``
    split : whose templates and words are used
    draws : what chooses the templates and words of prose
    """

    def __init__(self, kind: str, split: str, draws: Draws) -> None:
        self.kind = kind
        self.split = split
        self._draws = draws
        self._sentences: list[str] = []

    def sentences(self, num: int) -> list[str]:
        """Return the first `num` sentences."""
        while len(self._sentences) < num:
            noise = NOISE[self.split]
            next_one = self._prose() if self.kind == "prose" else noise[len(self._sentences) % len(noise)]
            self._sentences.append(next_one)
        return self._sentences[:num]

    def _prose(self) -> str:
        draws, split = self._draws, self.split
        roles, places = (
            [of[split][index] for index in draws.sample(len(of[split]), 2)] for of in (ROLES_OF, PLACES_OF)
        )
        time = draws.choose(TIMES_OF[split])
        return draws.choose(TEMPLATES_OF[split]).format(
            adjective=draws.choose(ADJECTIVES_OF[split]),
            noun=draws.choose(NOUNS_OF[split]),
            role=roles[0],
            role2=roles[1],
            place=places[0],
            place2=places[1],
            time=time,
            Time=time[0].upper() + time[1:],
        )
