"""Singular forms of English words by the rules that the official CHAIR script uses (`singularize` of `pattern.en`)."""

import re


# These rules decide which words CHAIR counts, so they are kept unchanged, oddities included: "bus" gives "bu" (but
# "buses" gives "bus"), "ties" gives "ty", "doggies" stays. Tests compare with the library's own output.

# Words that do not change. Neither does any ending of one: the library tests the list against the word from the wrong
# side, by which "ears" ("shears") stays too.
_UNCHANGED = """
    bison bream breeches britches carp chassis christmas clippers cod contretemps corps debris diabetes djinn eland elk
    flounder gallows georgia graffiti headquarters herpes high-jinks homework innings jackanapes mackerel measles mews
    mumps news pincers pliers proceedings rabies salmon scissors series shears species swine swiss trout tuna whiting
    wildebeest
    advice bread butter cheese electricity equipment fruit furniture garbage gravel happiness information ketchup
    knowledge love luggage mathematics mayonnaise meat mustard progress research rice sand software understanding water
"""
_STAYS = frozenset(word[start:] for word in _UNCHANGED.split() for start in range(len(word)))
# Words whose plural in -ies does not change, whatever precedes them.
_IN_IE = """
    alergie auntie beanie birdie bogie bombie collie cookie cutie doggie eyrie freebie goonie groupie hankie hippie
    hoagie hottie indie junkie laddie laramie lingerie meanie newbie nightie oldie pixie quickie reverie rookie softie
    sortie stoolie sweetie techie toughie valkyrie veggie weenie yuppie zombie
"""
_IES_STAYS = tuple(word + "s" for word in _IN_IE.split())
# Endings that are replaced, in words of any beginning ("firemen").
_PAIRS = """
    atlantes>atlas atlases>atlas axes>axe beeves>beef brethren>brother children>child corpora>corpus corpuses>corpus
    ephemerides>ephemeris feet>foot ganglia>ganglion geese>goose genera>genus genii>genie graffiti>graffito
    helves>helve kine>cow leaves>leaf loaves>loaf men>man mongooses>mongoose monies>money moves>move mythoi>mythos
    numena>numen occipita>occiput octopodes>octopus opera>opus opuses>opus our>my oxen>ox penes>penis penises>penis
    people>person sexes>sex soliloquies>soliloquy teeth>tooth testes>testis trilbys>trilby turves>turf zoa>zoon
"""
_IRREGULAR = dict(pair.split(">") for pair in _PAIRS.split())
_IRREGULAR_END = re.compile(f"(?:{'|'.join(_IRREGULAR)})$")

# The rules in the library's order, of which the first that fits is used: what must precede the ending, the ending, and
# its replacement.
_RULES = (
    *((".", "ae", "a"), (".", "itis", "itis"), (".", "eaux", "eau"), ("quiz", "zes", ""), ("matr", "ices", "ix")),
    *(
        ("ap|vert|ind", "ices", "ex"),
        ("alias|status", "es", ""),
        ("[octpvir|]", "i", "us"),
        ("cris|ax|test", "es", "is"),
    ),
    *(("shoe", "s", ""), ("o", "es", ""), ("bus", "es", ""), ("[ml|]", "ice", "ouse"), ("x|ch|ss|sh", "es", "")),
    *(("m", "ovies", "ovie"), (".", "ombies", "ombie"), ("s", "eries", "eries"), ("[^aeiouy]|qu", "ies", "y")),
    *(("[aeo]l|[^d]ea|ar", "ves", "f"), ("er", "ves", "ve"), ("[nlw]i", "ves", "fe"), ("[lr]", "ves", "f")),
    *(("[aeo]", "ves", "ve"), ("sive|tive|hive", "s", ""), ("[^f]", "ves", "fe"), ("^analy", "ses", "sis")),
    *(("ba|diagno|parenthe|progno|synop|the", "ses", "sis"), (".", "opses", "opsis"), (".", "yses", "ysis")),
    *(("[hdronbp]|cl", "oses", "ose"), ("fruct|gluc|galact|lact|ket|malt|rib|sacchar|cellul", "ose", "ose")),
    *((".", "oses", "osis"), ("[ti]", "a", "um"), ("n", "ews", "ews"), ("", "s", "")),
)
_PATTERNS = tuple((re.compile(f"((?:{before})){ending}$"), rf"\g<1>{new}") for before, ending, new in _RULES)


def singular(word: str) -> str:
    """
    The singular of a lower-case word, according to the official script.

    Compounds with a preposition ("mothers-in-law") are left alone: they name nothing in the list of objects.
    """
    if word in _STAYS or word.endswith(_IES_STAYS):
        return word
    irregular = _IRREGULAR_END.search(word)
    if irregular:
        return word[: irregular.start()] + _IRREGULAR[irregular[0]]
    for pattern, replacement in _PATTERNS:
        changed, count = pattern.subn(replacement, word)
        if count:
            return changed
    return word
