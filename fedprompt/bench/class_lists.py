"""Real class lists to measure with, because names decide how many tokens a prompt has."""

from __future__ import annotations

from fedprompt.errors import UserError


def _split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.replace("\n", " ").split(",") if name.strip())


EUROSAT = _split("""
annual crop land, forest, herbaceous vegetation land, highway or road, industrial buildings,
pasture land, permanent crop land, residential buildings, river, sea or lake
""")
"""EuroSAT (Helber et al., 2019): 10 land-use classes, worded as in CoOp's public code."""

RESISC45 = _split("""
airplane, airport, baseball diamond, basketball court, beach, bridge, chaparral, church,
circular farmland, cloud, commercial area, dense residential, desert, forest, freeway,
golf course, ground track field, harbor, industrial area, intersection, island, lake, meadow,
medium residential, mobile home park, mountain, overpass, palace, parking lot, railway,
railway station, rectangular farmland, river, roundabout, runway, sea ice, ship, snowberg,
sparse residential, stadium, storage tank, tennis court, terrace, thermal power station, wetland
""")
"""NWPU-RESISC45 (Cheng et al., 2017): 45 scene classes."""

CIFAR100 = _split("""
apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge,
bus, butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud,
cockroach, couch, crab, crocodile, cup, dinosaur, dolphin, elephant, flatfish, forest, fox, girl,
hamster, house, kangaroo, keyboard, lamp, lawn mower, leopard, lion, lizard, lobster, man,
maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid, otter, palm tree,
pear, pickup truck, pine tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray, road,
rocket, rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel,
streetcar, sunflower, sweet pepper, table, tank, telephone, television, tiger, tractor, train,
trout, tulip, turtle, wardrobe, whale, willow tree, wolf, woman, worm
""")
"""CIFAR-100 (Krizhevsky, 2009): 100 classes."""

QUICK_DRAW = _split("""
aircraft carrier, airplane, alarm clock, ambulance, angel, animal migration, ant, anvil, apple,
arm, asparagus, axe, backpack, banana, bandage, barn, baseball bat, baseball, basket, basketball,
bat, bathtub, beach, bear, beard, bed, bee, belt, bench, bicycle, binoculars, bird, birthday cake,
blackberry, blueberry, book, boomerang, bottlecap, bowtie, bracelet, brain, bread, bridge,
broccoli, broom, bucket, bulldozer, bus, bush, butterfly, cactus, cake, calculator, calendar,
camel, camera, camouflage, campfire, candle, cannon, canoe, car, carrot, castle, cat, ceiling fan,
cell phone, cello, chair, chandelier, church, circle, clarinet, clock, cloud, coffee cup, compass,
computer, cookie, cooler, couch, cow, crab, crayon, crocodile, crown, cruise ship, cup, diamond,
dishwasher, diving board, dog, dolphin, donut, door, dragon, dresser, drill, drums, duck,
dumbbell, ear, elbow, elephant, envelope, eraser, eye, eyeglasses, face, fan, feather, fence,
finger, fire hydrant, fireplace, firetruck, fish, flamingo, flashlight, flip flops, floor lamp,
flower, flying saucer, foot, fork, frog, frying pan, garden hose, garden, giraffe, goatee,
golf club, grapes, grass, guitar, hamburger, hammer, hand, harp, hat, headphones, hedgehog,
helicopter, helmet, hexagon, hockey puck, hockey stick, horse, hospital, hot air balloon, hot dog,
hot tub, hourglass, house plant, house, hurricane, ice cream, jacket, jail, kangaroo, key,
keyboard, knee, knife, ladder, lantern, laptop, leaf, leg, light bulb, lighter, lighthouse,
lightning, line, lion, lipstick, lobster, lollipop, mailbox, map, marker, matches, megaphone,
mermaid, microphone, microwave, monkey, moon, mosquito, motorbike, mountain, mouse, moustache,
mouth, mug, mushroom, nail, necklace, nose, ocean, octagon, octopus, onion, oven, owl,
paint can, paintbrush, palm tree, panda, pants, paper clip, parachute, parrot, passport, peanut,
pear, peas, pencil, penguin, piano, pickup truck, picture frame, pig, pillow, pineapple, pizza,
pliers, police car, pond, pool, popsicle, postcard, potato, power outlet, purse, rabbit, raccoon,
radio, rain, rainbow, rake, remote control, rhinoceros, rifle, river, roller coaster,
rollerskates, sailboat, sandwich, saw, saxophone, school bus, scissors, scorpion, screwdriver,
sea turtle, see saw, shark, sheep, shoe, shorts, shovel, sink, skateboard, skull, skyscraper,
sleeping bag, smiley face, snail, snake, snorkel, snowflake, snowman, soccer ball, sock,
speedboat, spider, spoon, spreadsheet, square, squiggle, squirrel, stairs, star, steak, stereo,
stethoscope, stitches, stop sign, stove, strawberry, streetlight, string bean, submarine,
suitcase, sun, swan, sweater, swing set, sword, syringe, t-shirt, table, teapot, teddy-bear,
telephone, television, tennis racquet, tent, The Eiffel Tower, The Great Wall of China,
The Mona Lisa, tiger, toaster, toe, toilet, tooth, toothbrush, toothpaste, tornado, tractor,
traffic light, train, tree, triangle, trombone, truck, trumpet, umbrella, underwear, van, vase,
violin, washing machine, watermelon, waterslide, whale, wheel, windmill, wine bottle, wine glass,
wristwatch, yoga, zebra, zigzag
""")
"""Quick, Draw! (Ha and Eck, 2017): 345 classes, the label set of DomainNet (Peng et al., 2019)."""

LISTS = (EUROSAT, RESISC45, CIFAR100, QUICK_DRAW)
"""All lists, in the order of their sizes."""


def class_names(count: int) -> tuple[str, ...]:
    """The first `count` names of the shortest list that has as many.

    Raises:
        UserError: `count` is less than 2, or more than the longest list has.
    """
    for names in LISTS:
        if 2 <= count <= len(names):
            return names[:count]
    raise UserError(f"{count} classes: choose between 2 and {len(QUICK_DRAW)}.")
