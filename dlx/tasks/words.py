"""The words that the tasks draw from; their order is part of every seeded stream."""
# ruff: noqa: SIM905  (lists of words are easier to read as text)

from __future__ import annotations

WOMEN = ("Mia Ava Emma Lily Zoe Nora Ruby Ella Anna Rosa Maya Ivy Clara Sara Julia Alice Hana Lena Priya Amina").split()
MEN = "Leo Max Tom Ben Sam Noah Omar Finn Jack Luis Ravi Adam Hugo Oscar Paul Felix Kofi Ivan Dan Eli".split()
NAMES = WOMEN + MEN
LAST_NAMES = "Lopez Smith Kim Novak Silva Brown Rossi Chen Weber Ali Jones Sato Costa Singh Moore Ivanov".split()
CITIES = (
    "Paris London Tokyo Rome Cairo Lima Oslo Delhi Berlin Madrid Boston Sydney Toronto Nairobi Seoul Lisbon"
).split()
JOBS = ("nurse teacher pilot chef farmer doctor painter lawyer baker singer driver engineer writer dentist").split()

NOUNS = (
    "apple river stone cloud tiger lemon candle window garden silver rocket pencil yellow forest market "
    "bridge planet summer winter orange dragon castle violin pepper button island mirror monkey ladder "
    "helmet kitten puzzle basket farmer anchor banana carrot desert engine feather guitar hammer insect "
    "jacket kettle lantern magnet needle ocean parrot quartz rabbit saddle tunnel umbrella valley "
    "walnut zebra"
).split()

# of the word problems
ITEMS = (
    "apples books marbles stickers coins cookies pencils shells stamps cards flowers balloons beads buttons "
    "oranges toys stones candies ribbons muffins"
).split()
BOXES = "boxes bags packs baskets jars trays".split()

# of the functions
FUNCTIONS = "solve compute process run calc handle collect apply transform work".split()
ARGUMENTS = "xs nums values items data arr".split()

# of the stories
ANIMALS = "fox cat dog bear owl frog mouse rabbit dragon turtle pony duck penguin squirrel".split()
PLACES = "forest garden village castle beach farm mountain meadow library market".split()
THINGS = (
    "kite,ball,lantern,drum,red hat,golden key,map,little boat,music box,magic stone,blue scarf,silver bell"
).split(",")
TRAITS = "brave kind shy clever curious cheerful quiet gentle".split()
FEELINGS = "happy proud thankful glad excited".split()
WEATHERS = "sunny rainy windy snowy foggy".split()
