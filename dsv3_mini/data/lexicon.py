"""The words of the stories, by category: what the grammar's slots may hold.

The generator draws from these lists and the judge looks words up in them; neither has a word of its own. Objects,
places, hiding spots and animals share no word, so "the lantern" can only be a thing and "the cellar" only a place.

Some words of a list are told far more often than others, as in any language (Zipf): see `draw`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from random import Random
from typing import TypeVar

Word = TypeVar("Word")


def words(text: str) -> list[str]:
    """A list written as running text."""
    return text.split()


# ---- people ----------------------------------------------------------------------------------------------------------

GIRLS = words("""Ada Agnes Alba Alice Alma Amina Anna Astrid Bella Bertha Bianca Carla Carmen Celia Chloe Clara Cora Dana Daisy
Delia Diana Dora Edith Elena Ella Elsa Emma Erika Esther Eva Fatima Fiona Flora Frida Gina Greta Hanna Hazel Helen Hilda
Ida Ines Ingrid Irene Jane Judith Julia Kate Klara Laila Laura Lena Lina Lucy Maria Martha Mina Mira Nadia Nina Nora Olga
Paula Petra Rita Rosa Ruth Sara Selma Sofia Stella Tara Tessa Ursula Vera Wanda Zoe""")
BOYS = words("""Aaron Adam Ahmed Albert Alvin Anton Arthur Axel Ben Boris Bruno Carl Cedric Chris Daniel David Dennis Edgar Eli
Emil Eric Ethan Felix Finn Frank Fred Gabriel George Hamid Hans Harry Henry Hugo Igor Isaac Ivan Jack Jacob James Jasper
John Jonas Josef Karim Karl Kevin Lars Leo Leon Louis Lukas Marco Martin Max Milo Moses Nils Noah Oliver Omar Oscar Otto
Paul Pedro Peter Rafael Robert Samuel Simon Stefan Theo Tom Tony Victor Walter Yusuf""")

JOBS = words("""actor archer architect artist astronomer author baker banker barber beekeeper blacksmith bookseller builder
butcher butler captain carpenter chemist clown coach cobbler composer cook dancer dentist detective diver doctor driver
editor engineer explorer farmer firefighter fisherman florist gardener geologist goldsmith grocer guard guide hunter
inventor jeweller joiner journalist judge juggler knight lawyer librarian locksmith magician mechanic merchant miller
miner monk musician nurse officer optician painter pharmacist photographer pilot pirate plumber poet porter postman potter
printer professor ranger sailor scientist sculptor secretary shepherd singer smith soldier surgeon tailor teacher thief
translator vet waiter watchmaker weaver wizard writer zookeeper""")

FEELINGS = words("""afraid amused angry annoyed anxious ashamed bored brave bitter calm careful cheerful clever comfortable
confident content curious delighted determined disappointed eager embarrassed excited exhausted fearless friendly glad
gloomy grateful grumpy happy hopeful hungry impatient jealous jolly joyful kind lazy lonely lucky merry miserable nervous
patient peaceful playful pleased polite proud relaxed relieved restless sad satisfied scared serious shy silly sleepy
surprised thankful thirsty thoughtful tired upset weary worried""")

REACTIONS = words("""blinked bowed chuckled clapped coughed danced frowned gasped giggled grinned groaned hummed jumped laughed
nodded paused rested shivered shrugged sighed smiled sneezed trembled waved whispered whistled winked yawned""")

HOBBIES = words("""baking boxing camping climbing cooking cycling dancing drawing farming fencing fishing gardening hiking
hunting jogging juggling knitting painting reading riding rowing running sailing sewing singing skating skiing spelling
swimming travelling walking weaving wrestling writing""")

TOPICS = words("""adventures angels battles books castles clouds comets dinosaurs dragons elephants fairies families farms
festivals forests games ghosts giants heroes holidays horses islands jungles kings legends machines monsters mountains
mysteries oceans pirates planets poems princes puzzles queens riddles rivers rockets robots ships songs stars storms
stories summers tigers trains treasures unicorns vampires volcanoes whales witches wolves""")

BONDS = words("classmates colleagues companions cousins friends neighbours partners relatives rivals teammates")
BOND_KINDS = words("best close dear good great loyal new old true")

# ---- things ----------------------------------------------------------------------------------------------------------

COLOURS = words("""azure beige black blue brown crimson green grey indigo lilac maroon olive orange pink purple red scarlet teal
turquoise violet white yellow""")
QUALITIES = words("""ancient antique battered beautiful big borrowed broken carved cheap clean costly cracked crooked curious
damp delicate dirty dull dusty elegant enormous expensive fancy favourite fine fragile funny handmade heavy huge important
large lovely magic modern narrow new odd old ordinary painted plain polished precious pretty rare round scratched secret
shiny simple small smooth special splendid spotted strange striped sturdy tiny ugly unusual useful valuable
wonderful""")
FOOD_QUALITIES = words("""big bitter crisp delicious fresh frozen fragrant giant juicy large ripe salty small soft sour spicy
sticky sweet tasty tender tiny""")

METALS = words("brass bronze copper gold iron pewter silver steel tin zinc")
WOODS = words("ash bamboo beech birch cedar ebony elm maple oak pine spruce walnut willow")
CLOTHS = words("cotton felt fleece lace linen satin silk velvet wool")
CLAYS = words("clay crystal glass granite jade marble porcelain stone")
HIDES = words("canvas cork leather rubber straw wicker")

# Each group: its things, and the materials that such a thing is made of.
OBJECT_GROUPS: tuple[tuple[list[str], list[str]], ...] = (
    (
        words("""anchor axe badge bell bolt bracelet brooch bucket buckle bugle candlestick chain chisel coin compass crown cymbal
        fork funnel goblet gong hammer helmet hinge hook horn horseshoe kettle key knife ladle lamp lantern lock locket
        medal nail necklace needle padlock pan pin poker pot rake ring saw screw shield shovel sieve skillet spade spoon
        sword teapot thimble torch tray trophy trumpet whistle wrench"""),
        METALS,
    ),
    (
        words("""abacus arrow banjo bat birdhouse boomerang bow broom cane canoe cello chessboard club comb domino easel
        fiddle figurine flute frame guitar harp ladder lute mallet mask oar paddle peg pencil pipe plank pole puppet raft
        rattle ruler sled spear spindle staff stick stool tambourine ukulele violin wheel xylophone"""),
        WOODS,
    ),
    (
        words("""apron bandage banner beret blanket bonnet cap cape cloak coat cushion dress flag glove gown hammock handkerchief
        hat hood jacket mitten napkin pillow quilt ribbon robe sash scarf shawl shirt skirt sock sweater tapestry tent tie
        towel tunic veil vest"""),
        CLOTHS,
    ),
    (
        words("""beaker bead bottle bowl bust cup dish flask inkwell jar jug lens mug pitcher plate prism saucer statue teacup
        tile tumbler urn vase"""),
        CLAYS,
    ),
    (
        words("""backpack bag ball basket belt boot bridle briefcase collar football hamper harness leash pouch purse rucksack
        saddle sandal satchel shoe slipper strap suitcase wallet whip"""),
        HIDES,
    ),
    (
        words("""atlas book calendar card certificate diary dictionary drawing envelope leaflet letter magazine map menu newspaper
        notebook painting passport photograph poem postcard poster puzzle receipt scroll sketch stamp ticket"""),
        [],
    ),
    (
        words("""balloon battery bicycle camera candle crayon doll drum feather fossil globe gem hourglass kite magnet microscope
        net paintbrush parasol pebble radio robot rope scooter shell skateboard sponge telescope thermometer umbrella
        wagon"""),
        [],
    ),
)
FOODS = words("""acorn apple bagel banana biscuit bun cabbage cake carrot cherry chestnut coconut cookie cucumber egg fig lemon
loaf lollipop mango melon muffin mushroom onion peach pear pie pineapple plum potato pretzel pumpkin sandwich sausage
strawberry tomato turnip waffle""")

MATERIALS = METALS + WOODS + CLOTHS + CLAYS + HIDES
OBJECTS = [thing for things, _ in OBJECT_GROUPS for thing in things] + FOODS
ADJECTIVES = sorted({*COLOURS, *QUALITIES, *FOOD_QUALITIES, *MATERIALS})

# ---- places: preposition, indoors, outdoors --------------------------------------------------------------------------

_PLACES: tuple[tuple[str, str, str], ...] = (
    (
        "in",
        """attic bakery ballroom barn basement bathroom bedroom bookshop cabin canteen castle cellar chapel cinema
        classroom clinic cottage dungeon factory gallery garage greenhouse gym hallway hospital hotel hut kitchen
        laboratory laundry library lighthouse lobby museum nursery office palace pantry parlour playroom school shed shop
        stable storeroom studio tavern temple theatre tower vault windmill workshop""",
        """alley canyon cave courtyard desert field forest garden grove jungle meadow orchard park pasture playground quarry
        ravine square street swamp valley village vineyard woods yard zoo""",
    ),
    (
        "on",
        "balcony ferry ship stage train",
        """beach bridge cliff dock farm hill island lawn mountain pier porch riverbank roof shore terrace""",
    ),
    ("at", "airport station", "camp circus crossroads fair fountain harbour lake market pond river stadium waterfall"),
)
INDOOR_PLACES = [place for _, inside, _ in _PLACES for place in inside.split()]
OUTDOOR_PLACES = [place for _, _, outside in _PLACES for place in outside.split()]
PLACE_PREPOSITIONS = {
    place: preposition for preposition, inside, outside in _PLACES for place in f"{inside} {outside}".split()
}

_INDOOR_SPOTS = """armchair:behind,under bathtub:in bed:on,under bin:in bookcase:behind,in box:in,under cabinet:behind,in
carpet:under chair:on,under chest:behind,in closet:in counter:behind,on,under cradle:in cupboard:behind,in curtain:behind
desk:on,under door:behind drawer:in fireplace:in locker:in mattress:under mirror:behind oven:in piano:behind,on,under
pillar:behind rug:on,under screen:behind shelf:on,under sink:in,under sofa:behind,on,under stairs:on,under
stove:behind,on table:on,under trunk:behind,in wardrobe:behind,in windowsill:on"""
_OUTDOOR_SPOTS = """arch:under barrel:behind,in bench:on,behind,under boat:in,under boulder:behind,on bush:behind,under
cart:in,under crate:in,under doghouse:behind,in fence:behind flowerpot:behind,in,under gate:behind grass:in
haystack:behind,in hedge:behind,under hole:in log:behind,on,under mailbox:in nest:in rock:behind,on,under sundial:behind,on
stump:behind,on tree:behind,under trough:in,under wall:behind,on well:behind,in wheelbarrow:in,under woodpile:behind,in"""


def _spots(text: str) -> list[str]:
    return [
        f"{preposition} the {noun}"
        for entry in text.split()
        for noun, prepositions in [entry.split(":")]
        for preposition in prepositions.split(",")
    ]


INDOOR_SPOTS = _spots(_INDOOR_SPOTS)
OUTDOOR_SPOTS = _spots(_OUTDOOR_SPOTS)

SPOT_NOUNS = sorted({spot.split()[2] for spot in INDOOR_SPOTS + OUTDOOR_SPOTS})
SPOT_LOOKS = words("big clean dark dirty dusty heavy huge large narrow new old ordinary plain small strange ugly")

# ---- promises --------------------------------------------------------------------------------------------------------

TASKS = words("""bake:bread bake:pastries brush:horses brush:pony build:bonfire build:snowman call:grandmother call:uncle
carry:firewood carry:parcels chop:firewood clean:chimney clean:windows close:shutters collect:eggs collect:firewood
cook:soup cook:supper count:sheep count:votes cut:grass deliver:flowers deliver:parcels dig:trench dust:furniture
feed:ducks feed:goats feed:hens feed:pigs fetch:aunt fetch:water fill:teapots find:kitten fold:clothes guard:money
guard:sheep hang:lamps hang:washing iron:clothes knit:socks light:lamps light:oven lock:windows mend:clothes mend:nets
milk:cows milk:goats mow:grass open:shutters paint:boats paint:ceiling pick:berries pick:flowers plant:bulbs plant:roses
plough:soil polish:boots polish:furniture read:instructions repair:engine repair:tractor scrub:floor scrub:pans
sell:vegetables shear:sheep sweep:chimney sweep:floor teach:children tidy:toys visit:aunt visit:grandmother wash:clothes
wash:dishes wash:windows water:roses water:vegetables weigh:flour wind:clocks wrap:presents""")
TASKS = [task.replace(":", " the ") for task in TASKS]
TASK_VERBS = sorted({task.split()[0] for task in TASKS})
TASK_NOUNS = sorted({task.split()[2] for task in TASKS})

# ---- scenery ---------------------------------------------------------------------------------------------------------

ANIMALS = words("""badger bear beetle bull butterfly camel cat chicken cow crab cricket crow deer dog donkey dove dragonfly duck
eagle falcon ferret fox frog goat goose hare hawk hedgehog hen heron horse jackdaw kitten lamb lizard magpie mole monkey
moth mouse mule octopus ostrich otter owl ox parrot peacock pelican penguin pig pigeon pony puppy rabbit raccoon rat raven
robin rooster seagull seal sheep snail snake sparrow spider squirrel stork swallow swan toad tortoise turkey turtle weasel
woodpecker""")
THIEVES = words("crow dog ferret fox goat jackdaw magpie monkey parrot puppy raccoon raven seagull squirrel weasel")
ANIMAL_DEEDS = words("dozed drank played rested sat slept stared stretched waited wandered watched yawned")
ANIMAL_DOINGS = words("breathing calling crying dozing eating humming moving playing resting singing sleeping snoring")
NEARBY = ["nearby", "close by", "in the shade", "in the sun", "in the distance", "all alone", "not far away"]
BIRDS = words("bees cranes crows doves ducks finches geese gulls hawks larks ravens rooks starlings storks swallows")
NUMBERS = words("two three four five six seven eight nine ten eleven twelve")

SKY_THINGS = words("afternoon day horizon light moon sky sun weather")
SKY_LOOKS = words("bright brilliant clear dim dull faint glorious golden grey hazy magnificent pale pleasant")
AIR_THINGS = words("air breeze fog frost mist rain snow wind")
AIR_FEELS = words("biting chilly cold cool faint fresh gentle icy light mild soft strong warm")
STREETS = words("avenue city country house lane neighbourhood path road room town")
STREET_MOODS = words("busy crowded dark deserted dusty empty noisy peaceful quiet silent sleepy still")
SMELLS = words("""bread cinnamon coffee flowers garlic ginger hay herbs honey lavender leather mint moss mud onions oranges
paint perfume roses sawdust smoke soap spices vanilla""")
MEALS_TOGETHER = words("""beans berries bread cereal cheese chocolate crackers custard dumplings fish grapes ham jam jelly
lentils lobster noodles nuts olives omelettes oysters pancakes pasta peas pickles pizza popcorn porridge pudding raisins
rice salad salmon scones shrimp soup spaghetti stew sweets toast trout yoghurt""")

WEATHERS = words("""autumn bright chilly cloudy cold cool damp dark dry foggy freezing frosty gloomy grey hazy hot humid icy mild
misty pleasant quiet rainy snowy stormy summer sunny warm wet wild windy winter""")
DAYTIMES = words("morning afternoon evening day night")
MONTHS = words("January February March April May June July August September October November December")
WEEKDAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
SEASONS = words("spring summer autumn winter")
MEALS = words("breakfast lunch dinner supper tea")
EVENTS = words("""celebration ceremony concert contest dance earthquake eclipse election exam flood funeral harvest holidays
journey lesson meeting parade party picnic race show storm tournament war wedding""")

MOVES = words("""crept cycled dashed drove hurried jogged limped marched moved raced ran rode rushed sneaked sprinted strolled
trotted walked wandered went""")
MANNERS = words("""boldly briefly bravely brightly calmly carefully carelessly cautiously cheerfully eagerly easily gently
gladly gracefully happily hastily kindly lazily loudly nervously nicely patiently peacefully politely proudly quickly
quietly sadly secretly seriously shyly silently sleepily slowly softly suddenly swiftly thoughtfully warmly wisely""")
DAY_KINDS = words("""amazing awful busy calm difficult exciting extraordinary funny good happy hard interesting long lucky
memorable peaceful perfect pleasant sad splendid strange terrible wonderful""")
SONGS = words("carol hymn lullaby melody song tune")
SONG_KINDS = words("cheerful famous foreign funny gentle happy little long lovely old popular sad short silly slow")

# ---- how often -------------------------------------------------------------------------------------------------------


# Zipf's exponents. What a story comes back to (people, things, places, promises) a small model has to learn to copy, word by
# word, so it is drawn from fewer words; what passes by (feelings, weather, smells) only has to be known.
RETURNING, PASSING = 1.75, 1.5


def draw(rng: Random, words: Sequence[Word], exponent: float = PASSING) -> Word:
    """A word of a list, its rank r as frequent as 1 / (r + 1)^exponent. Which word has which rank is a fixed shuffle."""
    order, weights = _frequencies(len(words), exponent)
    return words[rng.choices(order, cum_weights=weights)[0]]


@cache
def _frequencies(count: int, exponent: float) -> tuple[list[int], list[float]]:
    """The places of a list of `count` words, most frequent first, and their weights added up."""
    order = list(range(count))
    Random(count).shuffle(order)
    return order, list(accumulate((rank + 1) ** -exponent for rank in range(1, count + 1)))


# ---- slots -----------------------------------------------------------------------------------------------------------

# What a grammar slot with this name may hold, when the slot is a free choice.
CATEGORIES: dict[str, list[str]] = {
    "job": JOBS, "feeling": FEELINGS, "reaction": REACTIONS, "hobby": HOBBIES, "topic": TOPICS, "bonds": BONDS,
    "bond_kind": BOND_KINDS, "animal": ANIMALS, "animal_deed": ANIMAL_DEEDS, "animal_doing": ANIMAL_DOINGS,
    "nearby": NEARBY, "birds": BIRDS, "number": NUMBERS, "sky_thing": SKY_THINGS, "sky_look": SKY_LOOKS,
    "air_thing": AIR_THINGS, "air_feel": AIR_FEELS, "street": STREETS, "street_mood": STREET_MOODS, "smell": SMELLS,
    "dish": MEALS_TOGETHER, "weather": WEATHERS, "daytime": DAYTIMES, "month": MONTHS, "weekday": WEEKDAYS,
    "season": SEASONS, "meal": MEALS, "event": EVENTS, "went": MOVES, "manner": MANNERS, "day_kind": DAY_KINDS,
    "song": SONGS, "song_kind": SONG_KINDS, "spot_noun": SPOT_NOUNS, "spot_look": SPOT_LOOKS, "worker": JOBS,
    "adj": ADJECTIVES,
}  # fmt: skip


def vocabulary() -> list[str]:
    """Every word of the lists, once, in alphabetical order."""
    lists = [*CATEGORIES.values(), GIRLS, BOYS, OBJECTS, ADJECTIVES, TASKS, INDOOR_SPOTS, OUTDOOR_SPOTS]
    lists.append(list(PLACE_PREPOSITIONS))
    return sorted({word for entries in lists for entry in entries for word in entry.split()})


_A_DESPITE_VOWEL = frozenset({"useful", "ukulele", "unicorn"})


def article(word: str) -> str:
    """What stands before `word`: "a" or "an"."""
    return "an" if word[0] in "aeiou" and word not in _A_DESPITE_VOWEL else "a"


def at(place: str) -> str:
    """Where somebody in `place` is: "in the cellar", "on the roof"."""
    return f"{PLACE_PREPOSITIONS[place]} the {place}"
