"""Distinguishes English from other languages by script and function words, without a model."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache


# English function words, and words that are common in descriptions of images, so that short ones have some too.
ENGLISH = """
a about above across after again against all along also although always am among an and another any are area around as
at away back be because been before behind being below beneath beside besides between both but by can clear close come
could dark den did die do does done down during each either else enough even every far few first for from front
further had has hat have having he her here high him his how however i if in inside into is it its itself just large
last least left less like little long looks low made many may me men middle might more most much must my near nearby
neither next no nor not now of off often on once one only onto or other others our out outside over own part per
perhaps plus pour quite rather right same seem seems seen several shall she should show showing shown shows side
similar since small so some something son still such than that the their them themselves then there these they this
those though three through throughout to together top toward towards two under underneath until up upon us very
visible war was we well were what when where whether which while white who whole whose why wide will with within
without would yet you your animal appears background ball beach bear bed bench bicycle big bike bird black blue board
boat body book books bottle bottom bowl box boy bright brown building buildings bus cake camera car cars cat center
centre chair chairs child children city clock cloud clouds coat color colorful colour cup day detail details dirt dog
dogs door dress eyes face feature features features female fence field fire flag floor flower flowers food football
forest fruit girl glass glasses gold grass gray green grey ground group hair hand hands hanging head hill holding
horse house image item items jacket kitchen lake lamp lands landscape lawn leaves light lines logo looking looks male
man mountain mountains night object objects ocean old orange painting pair pants paper park people person photo
photograph picture pink plant plants plate playing players purple red riding river road rock rocks roof room round
running sand scene sea shape shirt shoes sign sitting sky smiling snow square standing star station stone street suit
sun surface sweater table tail tall team tie tower town traffic train tree trees truck umbrella view walking wall
water waves wearing window windows wing wings woman women wood wooden words world yellow young four five six seven
eight nine ten hundred ale bag ban dan pod sit mug jar bread cheese fresh leaf basil food meal
"""

# Function words of languages in the Latin script. Those that English has too count for both, hence for neither.
OTHERS = {
    "German": """
        der die das ein eine einen einem einer eines und ist sind war mit auf im am an in von vom zu zum zur den dem
        des nicht auch sich sie er es wir ich du man wird werden hat haben als aus bei für über unter vor nach neben
        zwischen durch ohne um wie oder aber noch nur sehr kann dieses diese dieser bild zeigt steht sitzt eins hier
        gibt trägt einige zwei drei mehrere
    """,
    "French": """
        le la les l un une des du de d et est sont dans sur avec pour par au aux en qui que ne pas plus ce cette ces
        il elle ils elles on nous vous se son sa ses leur leurs y été être ou où mais comme sous devant derrière
        entre deux trois image montre porte très aussi voir qu a
    """,
    "Spanish": """
        el la los las un una unos unas de del y e es son está están en con por para al que se no su sus lo le les
        como más pero muy hay este esta estos sobre entre detrás delante dos tres imagen muestra lleva también tiene
        cerca donde o a
    """,
    "Italian": """
        il lo la i gli le un uno una di del della dei delle degli e è sono in con su sul sulla per al alla che non
        si da dal dalla nel nella come più ma molto questo questa due tre tra fra anche immagine mostra davanti
        dietro ha hanno o a
    """,
    "Portuguese": """
        o a os as um uma uns umas de do da dos das e é são está estão em no na nos nas com por para ao à que se não
        seu sua seus como mais mas muito este esta isto sobre entre dois duas três imagem mostra também tem atrás
    """,
    "Dutch": """
        de het een en is zijn in op met van voor aan bij naar te uit door over onder achter naast tussen niet ook
        die dat deze dit er wordt worden heeft hebben als maar om hij zij ze wij je veel twee drie staat zit
        afbeelding foto laat zien draagt
    """,
    "Swedish": """
        en ett och är på i av för med till som den det de inte om han hon har från vid under över mellan framför
        bakom sig ut två tre bilden visar bär också finns sitter står
    """,
    "Danish or Norwegian": """
        en et og er på i av af for med til som den det de ikke om han hun har fra ved under over mellem mellom foran
        bag bak sig seg ut ud to tre bildet billedet viser også sidder sitter står
    """,
    "Finnish": """
        ja on ei se että oli olla ovat hän joka mutta kuin myös kun niin tämä kuva kuvassa näkyy yksi kaksi kolme
        päällä vieressä edessä takana kanssa
    """,
    "Polish": """
        i w na z ze do się jest są to nie o jak ale po przy przez od dla za pod nad który która które oraz ten ta
        tym obraz zdjęcie przedstawia dwa trzy obok stoi
    """,
    "Czech or Slovak": """
        a v na s se je jsou z do si o k ve po za pod nad před který která jako ale to ten ta tento obrázek ukazuje
        dva dvě tři vedle stojí sú sa
    """,
    "Hungarian": """
        a az egy és van vannak nem hogy is ez azt meg kép képen látható mellett előtt mögött két három ban ben
    """,
    "Romanian": """
        un o și este sunt în pe cu de la din pentru care nu se mai sau lui ale unui unei imaginea arată doi două
        trei lângă
    """,
    "Turkish": """
        bir ve bu da de için ile olan var çok daha gibi üzerinde yanında önünde arkasında resim resimde fotoğraf iki
        üç
    """,
    "Indonesian or Malay": """
        yang dan di ke dari ini itu dengan untuk pada adalah ada sebuah seorang tidak dalam atas bawah gambar
        menunjukkan dua tiga memakai
    """,
    "Tagalog": """
        ang ng mga sa na ay at isang may ito nasa kanyang larawan dalawang
    """,
    "Vietnamese": """
        một và là của có trong trên với các những cho được này người không đang hai ba hình ảnh
    """,
    "Swahili": """
        na ya wa kwa ni katika la za cha mtu hii huyo picha inaonyesha
    """,
    "Latin": """
        et in est non ad ut cum ex sed qui quae quod per sit amet ipsum lorem dolor nec sunt
    """,
    "Esperanto": """
        la kaj estas en de sur kun al por ne ke ĝi li ŝi bildo montras
    """,
    "Welsh": """
        yn y yr mae a ac o i ar gyda ei llun dyn
    """,
}

_MIN_ENGLISH_WORDS = 6  # a text of at least this many words has function words if it is English
_WORD = re.compile(r"[^\W\d_]+")
_QUOTED = re.compile(r'"[^"]*"')
# Between two capitalized words these are part of a name.
_PARTICLES = frozenset(
    (
        *("de", "la", "los", "las", "del", "von", "van", "der", "den", "di"),
        *("da", "du", "le", "el", "al", "y", "e", "des", "dos"),
    )
)
# Endings far more frequent in English than elsewhere; they indicate English if nothing else does.
_ENGLISH_ENDING = re.compile(r"(ing|ed|ly|ness|ful|less|ght|ck|tch|th|sh|ee[a-z]?|oo[a-z]|tion|ment|ous|y|ers?)s?$")


def _masks() -> dict[str, int]:
    """A bit for each language that has the word; bit 0 is English."""
    masks: dict[str, int] = {}
    for bit, words in enumerate((ENGLISH, *OTHERS.values())):
        for word in words.split():
            masks[word] = masks.get(word, 0) | 1 << bit
    return masks


_MASKS = _masks()
_NAMES = tuple(OTHERS)
_ENGLISH_ONLY = frozenset(word for word, mask in _MASKS.items() if mask & 1)
_OTHERS_ONLY = frozenset(_MASKS) - _ENGLISH_ONLY
_FOREIGN = {mask: [bit for bit in range(1, len(_NAMES) + 1) if mask >> bit & 1] for mask in set(_MASKS.values())}


def other_script(text: str, max_share: float) -> str | None:
    """
    The script, such as `"CYRILLIC"`, of which more than `max_share` of the letters are, or `None`.

    Greek letters in a formula or on a sign in the image stay below the share.
    """
    if text.isascii():
        return None
    scripts: dict[str, int] = {}
    letters = 0
    for character in text:
        if character.isalpha():
            letters += 1
            if character > "\u024f":  # the end of the Latin blocks
                name = _script(character)
                scripts[name] = scripts.get(name, 0) + 1
    scripts.pop("LATIN", None)
    if not scripts or sum(scripts.values()) <= max_share * letters:
        return None
    return max(scripts, key=lambda name: scripts[name])


@lru_cache(maxsize=8192)
def _script(character: str) -> str:
    return unicodedata.name(character, "unknown").split()[0]


def surely_english(words: Sequence[str], min_english: float) -> bool:
    """
    Whether [`other_language`] need not look: no word is another language's alone, and enough are English.

    Args:
        words: In lower case, with their apostrophes.
        min_english: As for [`other_language`].
    """
    return _OTHERS_ONLY.isdisjoint(words) and sum(map(_ENGLISH_ONLY.__contains__, words)) >= min_english * len(words)


def other_language(sentence: str, min_english: float) -> str | None:
    """
    The language that a sentence or text seems to be in, if it is not English.

    Only words that one of two languages has and the other does not have count. A capital within a sentence begins a
    name (`a painting by Leonardo da Vinci in La Spezia`), which is ignored, as is text in quotes.

    Args:
        sentence: In the Latin script, see [`other_script`].
        min_english: Share of English words that six or more words in lower case need.

    Returns:
        `str` or `None`: one of `OTHERS`, or `"no English"` where too few words are English and no other language is
        known; `None` for English, and for a few inconclusive words.
    """
    sentence = _QUOTED.sub(" ", sentence)
    words = _WORD.findall(sentence.lower() if sentence.isupper() else sentence)
    if not words:
        return None
    masks = [_MASKS.get(words[0].lower(), 0)]
    for place, word in enumerate(words[1:], start=1):
        if word[0].isupper():
            masks.append(_MASKS.get(word.lower(), 0) & 1)
        elif word not in _PARTICLES or not _within_name(words, place):
            masks.append(_MASKS.get(word, 0))
    english = sum(mask & 1 for mask in masks)
    foreign = [0] * (len(_NAMES) + 1)
    shared = [0] * (len(_NAMES) + 1)
    for mask in masks:
        if mask > 1:
            counts = shared if mask & 1 else foreign
            for bit in _FOREIGN[mask]:
                counts[bit] += 1
    accented = 0 if sentence.isascii() else sum(not word.isascii() for word in words)
    best = max(range(1, len(foreign)), key=lambda bit: (foreign[bit], shared[bit]))
    there, here = foreign[best] + accented, english - shared[best]
    if foreign[best] and there > here and (there >= 2 or english == 0):
        return _NAMES[best - 1]
    if english == 0 and len(words) >= 3 and accented > len(words) / 5:
        return "no English"
    plain = [word for word in words if word.islower()]  # a list of names is not in any language
    if len(plain) >= _MIN_ENGLISH_WORDS and english < min_english * len(plain):
        likely = sum(bool(_ENGLISH_ENDING.search(word)) for word in plain if _MASKS.get(word, 0) == 0)
        if english + likely < min_english * len(plain):
            return "no English"
    return None


def _within_name(words: Sequence[str], place: int) -> bool:
    """Whether the nearest words before and after that are not particles begin with capitals."""
    before = next((word for word in reversed(words[:place]) if word not in _PARTICLES), "")
    after = next((word for word in words[place + 1 :] if word not in _PARTICLES), "")
    return before[:1].isupper() and after[:1].isupper()
