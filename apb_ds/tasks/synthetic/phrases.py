"""Many ways of saying and asking the same, of which training draws one for each document."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Saying:
    """How a key is given its value, and how it is asked for: `one` value, or `many` of one key or of several."""

    needle: str
    one: tuple[str, str]
    many: tuple[str, str]

    def ask_one(self, key: str, what: str) -> tuple[str, str]:
        """Return query and answer prefix."""
        return self.one[0].format(key=key, what=what), self.one[1].format(key=key, what=what)

    def ask_many(self, key: str, what: str) -> tuple[str, str]:
        """Return query and answer prefix for several values; `key` may name several keys."""
        return self.many[0].format(key=key, what=what), self.many[1].format(key=key, what=what)


@dataclass(frozen=True)
class Assignment:
    """How the first variable of a chain is given a value, and the next ones a variable."""

    first: str
    next: str


@dataclass(frozen=True)
class Asking:
    """A query and an answer prefix."""

    query: str
    prefix: str

    def format(self, **values: object) -> tuple[str, str]:
        """Return both with the values filled in."""
        return self.query.format(**values), self.prefix.format(**values)


INTRODUCTIONS = (
    "Read what follows with care. There will be questions about it.",
    "Here is a document. Keep in mind what it says; you will need it.",
    "The following was written down by several people. Questions come at the end.",
    "Below you find notes of all sorts. Some of them matter.",
    "Go through this text from beginning to end. Afterwards I want to know something.",
    "A long text begins here. Memorise its details.",
    "Some pieces of information are hidden in the text below. You will be quizzed about them.",
    "Please study this record. I shall ask about a part of it.",
)
WHATS = (
    "number",
    "code",
    "value",
    "secret number",
    "lucky number",
    "hidden code",
    "serial number",
    "access key",
    "special code",
    "registration",
)
SAYINGS = (
    Saying(
        "{key} has the {what} {value}.",
        ("What is the {what} of {key}?", "The {what} of {key} is"),
        ("What are the {what}s of {key}?", "The {what}s of {key} are"),
    ),
    Saying(
        "One of the {what}s for {key} is: {value}.",
        ("Which {what} for {key} does the text mention?", "The {what} for {key} that the text mentions is"),
        (
            "Which are all the {what}s for {key} that the text mentions?",
            "The {what}s for {key} that the text mentions are",
        ),
    ),
    Saying(
        "Note: {what} of {key} = {value}.",
        ("Tell me the {what} of {key}.", "The {what} of {key}:"),
        ("Tell me all {what}s of {key}.", "All {what}s of {key}:"),
    ),
    Saying(
        "{key}: {value}",
        ("Which {what} is listed for {key}?", "The {what} listed for {key} is"),
        ("Which {what}s are listed for {key}?", "The {what}s listed for {key} are"),
    ),
    Saying(
        "Do not forget that {value} is a {what} for {key}.",
        ("Which {what} for {key} was not to be forgotten?", "For {key}, the {what} not to be forgotten is"),
        ("Which {what}s for {key} were not to be forgotten?", "For {key}, the {what}s not to be forgotten are"),
    ),
    Saying(
        "{key} -> {value} ({what})",
        ("Where does {key} lead? Give the {what}.", "{key} leads to"),
        ("Where does {key} lead? Give every {what}.", "{key} leads to"),
    ),
    Saying(
        "Somebody wrote down {value} as the {what} of {key}.",
        ("Which {what} of {key} did somebody write down?", "Somebody wrote down for {key} the {what}"),
        ("Which {what}s of {key} did somebody write down?", "Somebody wrote down for {key} the {what}s"),
    ),
    Saying(
        "To open {key}, use the {what} {value}.",
        ("Which {what} opens {key}?", "What opens {key} is the {what}"),
        ("Which {what}s open {key}?", "What opens {key} are the {what}s"),
    ),
    Saying(
        "Entry for {key}; {what} {value};",
        ("Look up the entry for {key}: what is its {what}?", "According to the entry for {key}, its {what} is"),
        ("Look up the entries for {key}: what are the {what}s?", "According to the entries for {key}, the {what}s are"),
    ),
    Saying(
        "The {what} belonging to {key} reads {value}.",
        ("What does the {what} belonging to {key} read?", "The {what} belonging to {key} reads"),
        ("What do the {what}s belonging to {key} read?", "The {what}s belonging to {key} read"),
    ),
)
ASSIGNMENTS = (
    Assignment("Let {name} be {source}.", "Let {name} be {source}."),
    Assignment("{name} = {source}", "{name} = {source}"),
    Assignment("DEF {name} = {source}", "DEF {name} = DEF {source}"),
    Assignment("INT {name} = {source}.", "INT {name} = INT {source}."),
    Assignment("var {name} := {source};", "var {name} := {source};"),
    Assignment("{name} <- {source}", "{name} <- {source}"),
    Assignment("Put {source} into {name}.", "Copy {name} from {source}."),
    Assignment("{name} is given the value {source}.", "{name} is given the value of {source}."),
    Assignment("The name {name} stands for {source}.", "The name {name} stands for the same as {source}."),
    # A word in front of names, in capitals as names are, must not be taken for one.
    *(
        Assignment(f"{word} {{name}} {sign} {{source}}{end}", f"{word} {{name}} {sign} {word} {{source}}{end}")
        for word, sign, end in (
            ("REG", ":=", " "),
            ("LET", "=", " "),
            ("VAL", "=", "\n"),
            ("NUM", "=", ";"),
            ("SET", ":=", " "),
            ("KEY", "=", " "),
            ("CELL", "=", "\n"),
            ("FIELD", "==", " "),
            ("SLOT", "=", ""),
        )
    ),
)
VARIABLE_QUESTIONS = (
    Asking(
        "Find all variables that are given the value {value} in the text above.",
        "In the text above, {num} variables are given the value {value}. They are:",
    ),
    Asking("List every name that ends up equal to {value}.", "These {num} names are equal to {value}:"),
    Asking(
        "Which variables have the value {value}, by themselves or because of others?",
        "{num} variables have the value {value}, and these are",
    ),
    Asking(
        "Follow the chain from {value}: which {num} names are on it?", "The {num} names on the chain from {value} are"
    ),
    Asking("Name the {num} variables whose value is {value}.", "The variables whose value is {value}:"),
)
SEPARATORS = (" ", " ", ", ", "\n", "; ", " / ")
MARKERS = ("...", "....", "--", "~", "* * *", "_")
LIST_QUESTIONS = (
    Asking("What are the {num} most frequent words of {where}?", "The {num} most frequent words of {where} are"),
    Asking(
        "Pay no heed to marks that are no words. Which {num} words does {where} have most of?",
        "Going by {where}, the {num} words that it has most of are:",
    ),
    Asking(
        "Count the words of {where}. Which {num} are ahead of all others?",
        "In {where}, the {num} that are ahead of all others are",
    ),
    Asking("Name the {num} words that are repeated most in {where}.", "Repeated most in {where}:"),
)
