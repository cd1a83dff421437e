"""How the nano world is talked about: every sentence the model is trained on."""

import random
from collections.abc import Sequence

_RECOLOUR = (
    "make the {name} {colour}",
    "turn the {name} {colour}",
    "paint the {name} {colour}",
    "color the {name} {colour}",
    "change the {name} to {colour}",
    "recolor the {name} to {colour}",
    "change the color of the {name} to {colour}",
    "the {name} should be {colour}",
)
_BACKGROUND = (
    "make the background {colour}",
    "turn the background {colour}",
    "paint the background {colour}",
    "color the background {colour}",
    "change the background to {colour}",
    "recolor the background to {colour}",
    "change the color of the background to {colour}",
    "the background should be {colour}",
    "use a {colour} background",
)
_REMOVE = (
    "remove the {name}",
    "delete the {name}",
    "erase the {name}",
    "take away the {name}",
    "get rid of the {name}",
    "make the {name} disappear",
)
_ADD = (
    "add {name}{place}",
    "draw {name}{place}",
    "put {name}{place}",
    "place {name}{place}",
    "insert {name}{place}",
)
# With a second picture: what is asked for is seen there, not said.
_RECOLOUR_LIKE = (
    "make the {name} the color of the shape in image 2",
    "give the {name} the color from image 2",
    "paint the {name} like the shape in image 2",
    "change the color of the {name} to match image 2",
)
_BACKGROUND_LIKE = (
    "use the background of image 2",
    "give it the background from image 2",
    "make the background like in image 2",
    "change the background to match image 2",
)
_ADD_LIKE = (
    "add the shape from image 2{place}",
    "put the shape from image 2{place}",
    "insert the shape of image 2{place}",
)
_CAPTION = (
    "{shapes} on {ground} background",
    "a picture of {shapes} on {ground} background",
    "{shapes} with {ground} background",
)
_WHERE = {
    "left": " on the left",
    "right": " on the right",
    "top": " at the top",
    "bottom": " at the bottom",
    "top left": " at the top left",
    "top right": " at the top right",
    "bottom left": " at the bottom left",
    "bottom right": " at the bottom right",
    "middle": " in the middle",
    "": "",
}
_BEFORE = ("please ", "please ", "now ", "can you ", "i want you to ", "hey ")
_BEHIND = (".", ".", "!", " please", " please.", "?")
PUNCTUATION = (".", ",", "!", "?")


def recolour_sentence(name: str, colour: str, rng: random.Random) -> str:
    """Ask for another colour of the shape called `name`."""
    return rng.choice(_RECOLOUR).format(name=name, colour=colour)


def background_sentence(colour: str, rng: random.Random) -> str:
    """Ask for another background."""
    return rng.choice(_BACKGROUND).format(colour=colour)


def recolour_like_sentence(name: str, rng: random.Random) -> str:
    """Ask for the colour of the second picture's shape."""
    return rng.choice(_RECOLOUR_LIKE).format(name=name)


def background_like_sentence(rng: random.Random) -> str:
    """Ask for the second picture's background."""
    return rng.choice(_BACKGROUND_LIKE)


def add_like_sentence(place: str, rng: random.Random) -> str:
    """Ask for the second picture's shape; `place` may be empty."""
    return rng.choice(_ADD_LIKE).format(place=_WHERE[place])


def remove_sentence(name: str, rng: random.Random) -> str:
    """Ask for a shape to go."""
    return rng.choice(_REMOVE).format(name=name)


def add_sentence(kind: str, colour: str, place: str, rng: random.Random) -> str:
    """Ask for a new shape; `place` may be empty."""
    name = f"{article(colour)} {colour} {kind}"
    return rng.choice(_ADD).format(name=name, place=_WHERE[place])


def caption_sentence(
    parts: Sequence[tuple[str, str, str]], background: str, rng: random.Random
) -> str:
    """Say what a picture shows; parts are (kind, colour, place), named left to right.

    Two shapes side by side are the rule, so their places may go unsaid; above each other is said.
    """
    say_places = any(place in ("top", "bottom") for *_, place in parts)
    names = [
        f"{article(colour)} {colour} {kind}{_WHERE[place] if say_places else ''}"
        for kind, colour, place in parts
    ]
    ground = f"{article(background)} {background}"
    wording = rng.choice(_CAPTION[:1] if say_places else _CAPTION)  # the others would not fit
    return wording.format(shapes=" and ".join(names), ground=ground)


def article(word: str) -> str:
    """The article a word takes."""
    return "an" if word[0] in "aeiou" else "a"


def vocabulary(names: Sequence[str], *, two_pictures: bool = False) -> list[str]:
    """Every word the tokenizers know, sorted; any other word is unknown to T5.

    Args:
        names: of kinds and colours.
        two_pictures: with the words that speak of a second picture.
    """
    sentences = (*_RECOLOUR, *_BACKGROUND, *_REMOVE, *_ADD, *_CAPTION, *_WHERE.values())
    if two_pictures:
        sentences += (*_RECOLOUR_LIKE, *_BACKGROUND_LIKE, *_ADD_LIKE)
    fields = {"name": "", "colour": "", "place": "", "shapes": "", "ground": ""}
    words = {word for sentence in sentences for word in sentence.format(**fields).split()}
    return sorted(words | set(names) | {"a", "an", "the", "and", "shape", "please", "can", "you"})


def speak(sentence: str, rng: random.Random) -> str:
    """Say a sentence as people do, now and then with a word or a mark that means nothing."""
    before = rng.choice(_BEFORE) if rng.random() < 0.1 else ""
    behind = rng.choice(_BEHIND) if rng.random() < 0.15 else ""
    return f"{before}{sentence}{behind}"
