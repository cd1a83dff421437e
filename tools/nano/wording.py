"""Every sentence a nano model is trained on."""

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
# With a second image, which shows what is asked for.
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
_PREFIXES = ("please ", "please ", "now ", "can you ", "i want you to ", "hey ")
_SUFFIXES = (".", ".", "!", " please", " please.", "?")
PUNCTUATION = (".", ",", "!", "?")


def recolour_sentence(name: str, colour: str, rng: random.Random) -> str:
    """Returns a request for another colour of the shape called `name`."""
    return rng.choice(_RECOLOUR).format(name=name, colour=colour)


def background_sentence(colour: str, rng: random.Random) -> str:
    """Returns a request for another background."""
    return rng.choice(_BACKGROUND).format(colour=colour)


def recolour_like_sentence(name: str, rng: random.Random) -> str:
    """Returns a request for the colour of the second image's shape."""
    return rng.choice(_RECOLOUR_LIKE).format(name=name)


def background_like_sentence(rng: random.Random) -> str:
    """Returns a request for the second image's background."""
    return rng.choice(_BACKGROUND_LIKE)


def add_like_sentence(place: str, rng: random.Random) -> str:
    """Returns a request for the second image's shape; `place` may be empty."""
    return rng.choice(_ADD_LIKE).format(place=_WHERE[place])


def remove_sentence(name: str, rng: random.Random) -> str:
    """Returns a request to remove a shape."""
    return rng.choice(_REMOVE).format(name=name)


def add_sentence(kind: str, colour: str, place: str, rng: random.Random) -> str:
    """Returns a request for a new shape; `place` may be empty."""
    name = f"{article(colour)} {colour} {kind}"
    return rng.choice(_ADD).format(name=name, place=_WHERE[place])


def caption_sentence(
    parts: Sequence[tuple[str, str, str]], background: str, rng: random.Random
) -> str:
    """Returns a caption of an image; parts are (kind, colour, place), named left to right.

    Two shapes are usually side by side, so only places above each other must be named.
    """
    name_places = any(place in ("top", "bottom") for *_, place in parts)
    names = [
        f"{article(colour)} {colour} {kind}{_WHERE[place] if name_places else ''}"
        for kind, colour, place in parts
    ]
    ground = f"{article(background)} {background}"
    wording = rng.choice(_CAPTION[:1] if name_places else _CAPTION)  # the others would get too long
    return wording.format(shapes=" and ".join(names), ground=ground)


def article(word: str) -> str:
    """Returns the article of a word."""
    return "an" if word[0] in "aeiou" else "a"


def vocabulary(names: Sequence[str], *, two_images: bool = False) -> list[str]:
    """Returns every word the tokenizers know, sorted; any other word is unknown to T5.

    Args:
        names: kinds and colours.
        two_images: whether to add the words that refer to a second image.
    """
    sentences = (*_RECOLOUR, *_BACKGROUND, *_REMOVE, *_ADD, *_CAPTION, *_WHERE.values())
    if two_images:
        sentences += (*_RECOLOUR_LIKE, *_BACKGROUND_LIKE, *_ADD_LIKE)
    fields = {"name": "", "colour": "", "place": "", "shapes": "", "ground": ""}
    words = {word for sentence in sentences for word in sentence.format(**fields).split()}
    return sorted(words | set(names) | {"a", "an", "the", "and", "shape", "please", "can", "you"})


def add_fillers(sentence: str, rng: random.Random) -> str:
    """Returns a sentence as people type it: at times with a word or a mark that means nothing."""
    prefix = rng.choice(_PREFIXES) if rng.random() < 0.1 else ""
    suffix = rng.choice(_SUFFIXES) if rng.random() < 0.15 else ""
    return f"{prefix}{sentence}{suffix}"
