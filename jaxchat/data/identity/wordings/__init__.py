"""How languages ask who the model is, and how it answers. To add one, translate `german.py` and name it below."""

from jaxchat.data.identity.wordings.base import Asked, Wordings
from jaxchat.data.identity.wordings.english import ENGLISH
from jaxchat.data.identity.wordings.french import FRENCH
from jaxchat.data.identity.wordings.german import GERMAN
from jaxchat.data.identity.wordings.spanish import SPANISH

__all__ = ["ENGLISH", "LANGUAGES", "NONE", "Asked", "Wordings"]

LANGUAGES = (ENGLISH, FRENCH, GERMAN, SPANISH)
NONE = Wordings(names=("none",))  # a language of which the file alone has the questions and answers
