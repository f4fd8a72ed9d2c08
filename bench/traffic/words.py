"""Text of a given number of words, made from a seed: reproducible, and unlike any other text.

There are 256 words, so a word is a byte, and a text is random bytes read as words. Each word is
one token in the vocabularies of Qwen2.5 and SmolLM2, alone and after a space, so that the words of
a text are its tokens. Other vocabularies are near; the server's usage is the truth.
"""

import random
import secrets
from functools import lru_cache

WORDS = """
able action again alone already among animal answer around baby band base beat begin best
bird blue boat born bottom bread bridge brown call camp card case catch center chair child
church class clear close coat color company control cool correct could course create cross
day deep develop divide done down dream during early east effect either energy enter even
every example face fair farm father feel figure final finger fire fish floor flower foot
foreign form four fresh front full gather give gold grass great ground guess hair happy have
heart help high hold home house ice inch join just king lake large lead least length letter
life like liquid little local look machine major map market master mean member middle mile
mind miss moment moon most mouth much must natural near never next nine note noun offer
often old open organ page paper part past pattern period phrase picture plain plane play
plural popular post prepare pretty problem pull quick quite rail raise reach ready reason
red repeat rest rich right river rock root round safe same save science sea season section
segment sell sense shape sheet shine shore should sign simple sing size skin slow snow solve
soon south speech spot spring star state stead stick stone store stream strong study success
summer supply symbol table take tell term that thing thought through tiny total town train
tree true type unit value verb view wait wall wash water wear weight west when whether while
wide wild window winter with word world wrong year
""".split()  # noqa: SIM905

_HEAD = 4  # Words that tell texts apart: 256**4 texts.


def fresh_salt() -> str:
    """A salt that no earlier run had: texts with it are in no server's prefix cache."""
    return secrets.token_hex(4)


def salted(seed: int, salt: str) -> str:
    """The seed of texts that another salt does not repeat; an empty salt changes nothing."""
    return f"{seed}/{salt}" if salt else str(seed)


def text(seed: int | str, stream: str, number: int, words: int) -> str:
    """`words` words with a space between; empty for 0.

    Texts of one seed and stream are told apart by `number`, from the first word on: any 256
    numbers in a row begin with 256 different words, and 2**32 in a row differ in their first four.
    A text of fewer words than that has only 256 a word to be distinct by. A longer text of the
    same number begins with the shorter one.
    """
    factor, offset = _mixing(seed, stream)
    head = ((factor * number + offset) % 256**_HEAD).to_bytes(_HEAD, "little")
    # Made in fours, or a longer one would not begin with a shorter one.
    tail = random.Random(f"{seed}/{stream}/{number}").randbytes(max(0, words - 1) // 4 * 4)
    return " ".join(map(WORDS.__getitem__, (head + tail)[:words]))


@lru_cache(maxsize=64)
def _mixing(seed: int | str, stream: str) -> tuple[int, int]:
    """Factor and offset of a one-to-one map of the whole numbers below 2**32."""
    rng = random.Random(f"{seed}/{stream}")
    # Odd, so that it has an inverse modulo every power of two.
    return rng.randrange(1, 256**_HEAD, 2), rng.randrange(256**_HEAD)
