"""Rules of the filter: what each drops and what it leaves alone, in English and other languages; changes; the docs."""

import textwrap
from pathlib import Path

import pytest

from transformers_minigpt4.curation.config import PROMPT, REPAIR_PROMPT
from transformers_minigpt4.curation.language import ENGLISH, other_language, other_script
from transformers_minigpt4.curation.phrases import DANGLING
from transformers_minigpt4.curation.rules import RULES, RuleSet
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.curation.text_checks import Text
from transformers_minigpt4.demo.texts import detailed_description
from transformers_minigpt4.demo.world import all_scenes


DOCS = Path(__file__).parents[2] / "docs" / "reference" / "rules.md"
LONG = [word for word in ENGLISH.split() if word not in DANGLING]  # each word once
CAT = "The image shows a black cat on a mat in a bright room. "
GOOD = (
    "The image shows a man in a red shirt, standing next to a white car. On the left side of the image, there is a "
    "tree with green leaves. On the right side of the image, there is a house with a brown roof. The sky is blue and "
    "there are no clouds. The overall mood is calm and peaceful.",
    'The sign reads "Sorry, we\'re closed". Two people walk past the small shop, over and over and over again.',
    "The man holds a step by step guide. He becomes more and more interested in it, as side by side they read.",
    "The store, at 5:30 p.m., sells 20% off U.S. goods, e.g. a pair of jeans (size 32/34) for $39.99. A clerk smiles.",
    "I can see a beautiful scene with mountains in the background, and a lake in front of them. A boat floats there!",
    "The logo has the letters “AI” in it. “What a day,” says the caption beneath the image of the robot.",
    "A crème brûlée stands on the table of a café, and beside it a cup of espresso. It looks delicious.",
    'The poster says "Liberté, égalité, fraternité" in large letters. A crowd stands in front of it, waving flags.',
    "A wooden sign says that the path goes on and on. Children continue to walk along it, hand in hand.",
    "A human stands beside a robot assistant in this drawing, which has the style of a children's book.",
)
# By rule: texts that it alone, or it first, must drop.
BAD = {
    "leftovers": (
        CAT + "###Human: Continue",
        CAT + "###",
        "<Img> " + CAT,
        CAT + "Human: What else?",
        "Here is the corrected paragraph: " + CAT,
        "Here’s the corrected version: " + CAT,
        "The given paragraph is already correct and needs no changes at all here.",
        CAT + "Give as many details as possible.",
        CAT + "[/INST] It sleeps.",
    ),
    "apology": (
        CAT + "I'm sorry I made a mistake, it is a dog.",
        CAT + "I’m sorry  I made a mistake, it is a dog.",
        CAT + "I apologize for that mistake.",
        CAT + "I APOLOGISE FOR THE CONFUSION.",
        CAT + "My apologies, the mat is red.",
    ),
    "self_reference": (
        "As an AI language model, I do not have eyes, but this seems to be a picture of a cat.",
        CAT + "I am unable to say more about the picture.",
        CAT + "Let me know if you have further questions!",
    ),
    "not_english": (
        CAT + "El gato es negro y está en la casa.",
        "Das Bild zeigt eine schwarze Katze, die auf einer Matte in einem hellen Zimmer liegt und schläft.",
        CAT + "Черная кошка лежит на коврике в комнате.",
        "这张图片显示了一只黑猫躺在明亮房间里的垫子上。",
    ),
    "meaningless": (
        CAT + "@@@@@@ is there.",
        CAT + "It is \x07 asleep.",
        CAT + "It is \ufffd asleep.",
        CAT + "It sleeps &nbsp; there.",
        CAT + "It <b>sleeps</b> there.",
        CAT + "It is at the cafÃ© now.",
        CAT + "It is called xkcdqwrtp by its owner.",
        CAT + "Aaaaaaah it sleeps.",
        CAT + "♥♦♣♠ ★☆ ▓▒░ it sleeps.",
        "1234 5678 9012 3456 : ; 12 / 34 = 56 + 78 - 90 * 12 . 34 , 55 a b c d.",
        CAT + "It is a " + "verylongword" * 4 + " indeed.",
    ),
    "repeated_words": (CAT + "It is very very very black.", CAT + "The The the cat sleeps."),
    "repeated_phrases": (
        CAT + "There is a cup on the table and a cup on the table and a plate.",
        CAT + "It goes to and fro to and fro to and fro all day.",
        "A red ball and a blue ball lie on a mat. Beside the mat, a red ball and a blue ball stand in a box. There a "
        "red ball and a blue ball hang from the ceiling.",
    ),
    "repeated_sentences": (
        CAT + "It sleeps all day. " + CAT,
        CAT + "It sleeps all day. It has white paws. It sleeps, all day!",
        CAT + "There is a small round table with four old wooden chairs next to the wall on its left side. There is a "
        "small round table with four old wooden chairs next to the wall on its right side.",
    ),
    "unfinished": (
        CAT + "Behind the mat stands",
        CAT + "Behind the mat stands a chair,",
        CAT + "And so it goes on...",
        CAT + "And so it goes on…",
    ),
    "fragment": (
        "and a cat is on a mat in the bright room, which has a window.",
        ", which is a cat on a mat in a bright room with a window.",
        CAT + "Behind the mat is the. The cat sleeps.",
    ),
    "too_short": ("A black cat on a mat.",),
    "too_long": (" ".join(" ".join(LONG[i : i + 10]).capitalize() + "." for i in range(0, len(LONG), 10)),),
}


@pytest.fixture(scope="module")
def rules() -> RuleSet:
    return RuleSet(prompts=(PROMPT, REPAIR_PROMPT))


@pytest.mark.parametrize("text", GOOD)
def test_good_texts_stay(rules, text):
    assert rules.check(text) == []


def test_the_demos_descriptions_stay(rules):
    import random

    rng = random.Random(0)
    texts = [detailed_description(scene, rng) for scene in all_scenes()]
    assert [text for text in texts if rules.check(text)] == []


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in BAD.items() for text in texts])
def test_bad_texts_go(rules, rule, text):
    found = rules.check(text)
    assert found and found[0][0] == rule, found
    assert found[0][1]  # says why


def test_every_rule_on_texts_has_its_cases():
    assert set(BAD) == {rule.name for rule in RULES if rule.check is not None}


def test_rules_are_pure_and_take_anything():
    odd = ("", " \n", ".", "\ud800", "\x00", "###", "'", "a" * 10_000, "a " * 5_000, ". " * 5_000, "\u202ea\u0301")
    for rule in RULES:
        if rule.check is not None:
            for raw in odd:
                first, second = (rule.check(Text(raw), **rule.parameters) for _ in range(2))
                assert first == second and bool(first.why) != first.keep


class TestLanguages:
    OTHERS = """
        Un perro marrón corre por la playa.|El hombre está sentado en un banco del parque.|Dos gatos negros.
        La imagen muestra a una mujer con un vestido rojo.|EL PERRO ESTÁ EN LA PLAYA.
        Tres personas caminando por la calle.|Un chien noir court sur la plage.
        L'image montre un homme assis sur un banc.|Une voiture rouge devant une maison.
        Ein Hund läuft am Strand.|Das Bild zeigt einen Mann mit einem Hut.|Zwei Kinder spielen im Garten.
        Ein Mann.|Il cane corre sulla spiaggia.|L'immagine mostra una donna con un cappello.|La casa.
        Um cachorro corre na praia.|A imagem mostra um homem sentado em um banco.|De hond is in het park.
        Op de foto staat een man met een hoed.|Hunden springer på stranden.
        Bilden visar en man som sitter på en bänk.|Billedet viser en mand i en rød jakke.
        Kuvassa näkyy mies, joka istuu penkillä.|Keittiössä on suuri pöytä ja neljä tuolia.
        Na zdjęciu widać mężczyznę siedzącego na ławce.|Pies biegnie po plaży.
        Na obrázku je muž, který sedí na lavičce.|A képen egy férfi ül egy padon.
        Imaginea arată un bărbat care stă pe o bancă.|Resimde bir adam bankta oturuyor.
        Gambar ini menunjukkan seorang pria yang duduk di bangku.|Ang larawan ay nagpapakita ng isang lalaki.
        Bức ảnh cho thấy một người đàn ông.|Picha inaonyesha mtu katika bustani.
        Lorem ipsum dolor sit amet consectetur.|La bildo montras viron kun ĉapelo.
        Mae'r llun yn dangos dyn ar y traeth.|Yi zhi gou zai hai tan shang ben pao.
        Þetta er mynd af hundi á ströndinni.|Koer jookseb rannas ja mängib palliga lastega.
        Ek kutta samudra tat par daud raha hai.|Собака бежит по пляжу.|Мужчина сидит на скамейке.
        一只狗在海滩上奔跑。|犬がビーチを走っています。|개가 해변을 달리고 있다.|الكلب يجري على الشاطئ.
        כלב רץ על החוף.|एक कुत्ता समुद्र तट पर दौड़ रहा है।|สุนัขวิ่งบนชายหาด|Ο σκύλος τρέχει στην παραλία.
        Perro corriendo en la playa con su dueño.|Chat noir sur le toit.|Hund am Strand mit Ball.
        Mooie rode bloem.|Una mujer sostiene un paraguas bajo la lluvia.|Hay tres manzanas sobre la mesa.
        Niños jugando al fútbol.|Un tren llega a la estación.|Deux femmes boivent du café en terrasse.
        Il y a un vélo contre le mur.|Des montagnes enneigées au coucher du soleil.|Vue aérienne d'une ville.
        Die Frau liest ein Buch im Café.|Auf dem Tisch stehen drei Gläser.|Ein rotes Auto fährt über die Brücke.
        Blick auf die Berge.|Una ragazza suona il violino.|Ci sono due biciclette davanti al negozio.
        Le barche sono nel porto.|Uma menina segura um balão vermelho.|Há duas bicicletas perto da árvore.
        O céu está azul.|Een vrouw leest een boek in de trein.|Er liggen drie appels op tafel.
        Twee katten slapen op de bank.|En flicka håller en röd ballong.|Två katter sover på soffan.
        Det finns en cykel vid väggen.|En pige holder en rød ballon.|To katter sover på sofaen.
        Det står en sykkel ved veggen.|Tyttö pitelee punaista ilmapalloa.|Kaksi kissaa nukkuu sohvalla.
        Dziewczynka trzyma czerwony balon.|Dwa koty śpią na kanapie.|Dívka drží červený balónek.
        Dve mačky spia na gauči.|Egy lány piros léggömböt tart.|Két macska alszik a kanapén.
        O fată ține un balon roșu.|Kız kırmızı bir balon tutuyor.|Seorang gadis memegang balon merah.
        Isang batang babae ang may hawak ng pulang lobo.|Cô gái cầm một quả bóng bay màu đỏ.
        Msichana ameshika puto jekundu.|Djevojka drži crveni balon.|Dekle drži rdeč balon.
        Mergaitė laiko raudoną balioną.|Meitene tur sarkanu balonu.|Una noia té un globus vermell.
        Neska batek puxika gorri bat du.|Девочка держит красный шар.|Дівчинка тримає червону кулю.
        一个女孩拿着红气球。|女の子が赤い風船を持っている。|소녀가 빨간 풍선을 들고 있다.|فتاة تحمل بالونا أحمر.
        ילדה מחזיקה בלון אדום.|एक लड़की लाल गुब्बारा पकड़े हुए है।|একটি মেয়ে লাল বেলুন ধরে আছে।
        ஒரு பெண் சிவப்பு பலூனை பிடித்திருக்கிறாள்.|เด็กหญิงถือลูกโป่งสีแดง
        Ένα κορίτσι κρατάει ένα κόκκινο μπαλόνι.
    """
    ENGLISH = """
        A brown dog runs along the beach.|Three dogs running outside.|Golden retriever puppy.
        Red car parked outside.|The sign says "Rue de la Paix" in white letters.
        A painting by Leonardo da Vinci hangs in La Spezia.|The Eiffel Tower in Paris, France.
        Leonardo da Vinci painted La Gioconda in Florence.|A man in a hat.
        A plate of spaghetti alla carbonara with parmesan.|Children playing soccer under cloudy skies.
        The man has a die in his hand and a hat.|It was also a war memorial, and so will be restored.
        Crème brûlée topped with fresh berries.|The café is on the corner.|An el train passes by the station.
        Several vintage bottles, jars, lamps, candles, clocks and books.|Close-up of a sushi roll with wasabi.
        A chihuahua wearing sombrero.|Bonsai trees decorate Japanese gardens beautifully.
        A MAN STANDS ON THE BEACH.|Two ladies, Maria de la Cruz and Juan de los Santos, smile.
        Steam rises gently upward.|Santa Claus waves.
        Fresh tomatoes, basil leaves, mozzarella slices, olive oil.|The picture shows a small red square.
        An old woman sells tacos al pastor from a cart.|Les Paul guitar leaning against an amplifier.
        Dan is on a sofa.|People ski down snowy slopes near Zermatt.
        Bright neon signs illuminate crowded Tokyo streets.|The letters α and β are written on the board.
        Vegetables, spices, herbs arranged neatly.|The Kanji 犬 is painted on the door of the house.
        Mr. van der Berg and his son Den are in a boat.|The dog, a dachshund, is asleep.
        She is doing yoga on a mat.|Du Pont engineers discuss an invention.
        He holds an old coat of arms on a pole.|Ten bags lie on the bed.|A girl holds a red balloon.
        Two cats sleep on the sofa.|There is a bicycle leaning against the wall.
        Snow-capped mountains at sunset.|Aerial view of a city.|A barista pours latte art in a ceramic cup.
        Paella with mussels, shrimp and saffron rice.|The Arc de Triomphe stands at the end of the avenue.
        Vincent van Gogh painted sunflowers in Arles.|Tourists photograph the Sagrada Familia in Barcelona.
        A matador in traje de luces faces the bull.|A bottle of Dom Pérignon on ice.
        Grilled salmon with asparagus.|Kids splash in puddles.
        Vintage typewriter, fountain pen, leather notebook.|The menu reads "Plat du jour: coq au vin".
        A street in Rio de Janeiro during carnival.|An El Camino parked near a taco stand in San Diego.
        Macro shot of a ladybug on clover.|Sunlight filters through stained glass windows.
        Commuters wait for delayed trains.|Graffiti covers abandoned warehouse walls.
        A karate class practices kata in a dojo.|Fireworks illuminate the Sydney Opera House.
        Dim sum baskets steam on a cart.|The banner says "Feliz Navidad" in gold.
        A man plays the oud in a souk in Marrakesh.|Freshly baked croissants and pains au chocolat.
        Herd of wildebeest crossing river.|Doctor examines patient.|Los Angeles skyline with palm trees.
        Le Mans race cars speed by.|A schnauzer and a dachshund chase a Frisbee.|Cherry blossoms line the canal.
    """

    @staticmethod
    def seems_foreign(text: str) -> bool:
        return bool(other_script(text, 0.1) or other_language(text, 0.2))

    def split(self, texts: str) -> list[str]:
        return [text.strip() for line in texts.strip().splitlines() for text in line.split("|")]

    def test_share_of_other_languages_found(self):
        """Down to two words. What gets through has neither accents nor a function word that English lacks."""
        texts = self.split(self.OTHERS)
        missed = [text for text in texts if not self.seems_foreign(text)]
        assert len(texts) == 115 and sorted(missed) == [
            "Blick auf die Berge.",
            "Dziewczynka trzyma czerwony balon.",
            "Hund am Strand mit Ball.",
            "Meitene tur sarkanu balonu.",
            "Mooie rode bloem.",
            "Msichana ameshika puto jekundu.",
        ]

    def test_english_stays(self):
        texts = self.split(self.ENGLISH)
        assert len(texts) == 74 and [text for text in texts if self.seems_foreign(text)] == []


class TestChanges:
    def test_parameters(self):
        text = "A black cat on a mat."
        assert RuleSet({"too_short": {"min_words": 6}}).check(text) == []
        assert RuleSet({"too_short": False}).check(text) == []
        (found,) = RuleSet({"apology": {"also": ["Black  CAT"]}, "too_short": False}).check(text)
        assert found == ("apology", "says 'black cat'")
        assert RuleSet({"apology": {"phrases": ["oops"]}}).check(CAT + "I apologize for that.") == []

    def test_the_projects_own_prompts(self):
        mine = RuleSet(prompts=("###Human: <Img><ImageHere></Img>Tell me all about this. ###Assistant:", "Continue"))
        assert mine.check(CAT + "Tell me all about this.")[0][0] == "leftovers"
        assert mine.check(CAT + "The stripes continue on its back.") == []

    def test_digest(self):
        digests = [RuleSet().digest(), RuleSet({"too_short": {"min_words": 9}}).digest()]
        digests += [RuleSet({"too_short": False}).digest(), RuleSet(prompts=["Say it with flowers."]).digest()]
        assert len(set(digests)) == 4 and RuleSet({}).digest() == digests[0]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"to_short": {}}, "no rule 'to_short'; the rules are leftovers"),
            ({"too_short": {"words": 3}}, "has no parameter 'words'; it has min_words"),
            ({"unfinished": {"words": 3}}, "it has none at all"),
            ({"too_short": 3}, "not 3; give an object of these, or false"),
            ({"too_short": {"min_words": "3"}}, "a number of 0 or more, not '3'"),
            ({"too_short": {"min_words": -1}}, "a number of 0 or more, not -1"),
            ({"too_short": {"min_words": True}}, "a number of 0 or more, not True"),
            ({"too_short": {"min_words": 2.5}}, "a whole number, not 2.5"),
            ({"duplicate_text": {"similarity": 1.7}}, "a share between 0 and 1, not 1.7"),
            ({"meaningless": {"max_share": float("nan")}}, "a share between 0 and 1, not nan"),
            ({"apology": {"phrases": "sorry"}}, "a list of phrases, not 'sorry'"),
            ({"apology": {"phrases": ["sorry", " "]}}, "a list of phrases"),
        ],
    )
    def test_bad_changes(self, changes, message):
        with pytest.raises(CurationError, match=message):
            RuleSet(changes)


def rules_table() -> str:
    """The rules with their defaults as Markdown: one table, and a list of phrases for each rule that goes by one."""
    lines = ["| rule | drops | parameters |", "| --- | --- | --- |"]
    for rule in RULES:
        values = [
            f"`{name}`" if isinstance(value, tuple) else f"`{name}` {value:g}"
            for name, value in rule.parameters.items()
        ]
        lines.append(f"| `{rule.name}` | {rule.what} | {', '.join(values)} |")
    for rule in RULES:
        for name, value in rule.parameters.items():
            if isinstance(value, tuple) and value:
                listed = ", ".join(f"`{phrase}`" for phrase in value)
                lines += ["", *textwrap.wrap(f"`{name}` of `{rule.name}`: {listed}.", 120, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"


def test_the_docs_list_the_rules_as_they_are():
    """After a change, put there what `rules_table()` gives now."""
    assert rules_table() in DOCS.read_text(encoding="utf-8")
