"""Invented clinic notes: the grammar that the demo model is trained on.

Owns the tables (names, complaints, findings, treatments), the drawing of one visit, and the
kinds of documents written from it: visit notes, follow-up notes, letters, paragraphs and chats.
All words here were written for this project; no person, clinic or visit is real, and the text
is no medical advice.

Document number `index` of seed `seed` is always the same text, on every machine. All chance goes
through `Draw`, which also adds up the information of the choices made. The text holds at most that
much: not every drawn fact is told in every kind of text.

Documents that the demo model has not seen, for whoever needs text of its kind:

    python -m scripts.demo_notes COUNT
"""

from __future__ import annotations

import datetime as dt
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

Item = TypeVar("Item")
Role = Literal["user", "assistant"]

MONTHS: Final = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
FIRST_YEAR: Final = 2031
LAST_YEAR: Final = 2034
LAST_DAY: Final = 28
"""Every month has this day, so that any drawn day and month make a date."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """One medicine with the only dose and schedule that the notes give it for a condition."""

    medicine: str
    dose: str
    schedule: str
    penicillin: bool = False

    @property
    def order(self) -> str:
        """The prescription, such as "ibuprofen 400 mg three times a day with food"."""
        return f"{self.medicine} {self.dose} {self.schedule}"


@dataclass(frozen=True, slots=True)
class Condition:
    """What belongs together in a note.

    Texts may hold the slots {they} {They} {their} {Their} {them} {side}. `reports` completes
    "The patient reports"; `denied` completes "She denies"; `findings` and `advice` are sentences.
    `onset` names the units in which the complaint's age is told. `months` is the time to review.
    `article` goes before `name` within a sentence.
    """

    name: str
    reason: str
    reports: tuple[str, ...]
    denied: tuple[str, ...]
    findings: tuple[str, ...]
    treatments: tuple[Treatment, ...]
    advice: tuple[str, ...]
    warning: str
    onset: tuple[str, ...] = ("days", "weeks")
    ages: tuple[int, int] = (18, 84)
    months: int = 1
    fever: bool = False
    high_pressure: bool = False
    women_only: bool = False
    article: str = ""


def _words(listed: str) -> tuple[str, ...]:
    return tuple(listed.split())


WOMEN: Final = _words(
    "Maria Anna Ingrid Leila Grace Sofia Helena Amara Nadia Clara Yuki Elif Rosa Irene Marta "
    "Fatima Joan Olga Priya Alice Carmen Esther Judith Lena Mina Paula Ruth Selma Tamara Vera"
)
MEN: Final = _words(
    "Peter Samuel Jonas Omar Victor Daniel Kofi Henrik Luca Martin Pavel Anton David Emil Felix "
    "George Hugo Ivan Karim Leon Marcus Nils Oscar Paul Rafael Simon Tomas Walter Yusuf Adam"
)
SURNAMES: Final = _words(
    "Okafor Lindqvist Moreau Tanaka Novak Haddad Keller Osei Petrov Silva Brandt Castell Dimitrov "
    "Eriksen Fontana Greco Hartmann Ibarra Jansen Kowal Larsen Mbeki Nakata Ortega Quist Rossi "
    "Sandoval Thorne Ueda Varga Whitlock Yilmaz Zeller Adeyemi Bellamy Corrigan"
)
SURNAME_STARTS: Final = _words(
    "Bal Ber Cal Dor El Fal Gar Hal Il Jor Kar Lan Mar Nor Or Pel Ral San Tor Ul Vas Wil Yar Zan"
)
SURNAME_ENDS: Final = _words(
    "ano berg den dini era field ford gren ini kova land low man mont nen off ova sen ski son "
    "stad ton vist wood"
)
DOCTORS: Final = _words("Lind Amadi Bauer Costa Devlin Endo Farouk Garland Holm Ivers Kimura Lopez")
ALLERGENS: Final = ("penicillin", "latex", "nuts", "shellfish")
PENICILLIN: Final = "penicillin"

PARACETAMOL: Final = Treatment("paracetamol", "1 g", "up to four times a day")
IBUPROFEN: Final = Treatment("ibuprofen", "400 mg", "three times a day with food")

CONDITIONS: Final = (
    Condition(
        name="acute bronchitis",
        reason="cough",
        reports=(
            "a cough that is worse at night",
            "a cough with white phlegm",
            "a dry cough and a tight feeling in the chest",
        ),
        denied=("chest pain", "weight loss", "night sweats", "blood in the phlegm"),
        findings=(
            "There are a few wheezes over both lungs.",
            "Breathing is calm and the oxygen level is normal.",
            "There is no dullness over the lungs.",
            "The throat is slightly red.",
        ),
        treatments=(
            PARACETAMOL,
            Treatment("salbutamol", "100 micrograms", "two puffs when needed"),
        ),
        advice=(
            "Drink plenty of water.",
            "Avoid smoke and dust.",
            "The cough may last for three weeks.",
        ),
        warning="the cough gets worse",
        onset=("days",),
    ),
    Condition(
        name="tonsillitis",
        reason="sore throat",
        reports=(
            "a sore throat and pain on swallowing",
            "a sore throat with fever and tiredness",
            "a painful throat and swollen glands",
        ),
        denied=("cough", "trouble breathing", "a rash", "ear pain"),
        findings=(
            "Both tonsils are swollen and red.",
            "There are white spots on the tonsils.",
            "The glands of the neck are tender.",
            "The ears are normal.",
        ),
        treatments=(
            Treatment("amoxicillin", "500 mg", "three times a day for seven days", penicillin=True),
            Treatment("clarithromycin", "250 mg", "twice a day for five days"),
        ),
        advice=(
            "Rest at home until the fever is gone.",
            "Take cool drinks and soft food.",
            "Finish the whole course of tablets.",
        ),
        warning="swallowing becomes harder",
        onset=("days",),
        ages=(18, 50),
        fever=True,
    ),
    Condition(
        name="migraine",
        reason="headache",
        reports=(
            "a throbbing headache with nausea",
            "attacks of headache on one side",
            "a strong headache that gets worse in bright light",
        ),
        denied=("a stiff neck", "fever", "weakness of an arm or leg", "a recent fall"),
        findings=(
            "Strength and feeling are normal in both arms and legs.",
            "The neck moves freely.",
            "The pupils are equal and react to light.",
            "The walk is steady.",
        ),
        treatments=(
            Treatment("sumatriptan", "50 mg", "at the start of an attack"),
            Treatment("propranolol", "40 mg", "twice a day"),
        ),
        advice=(
            "Keep a diary of the attacks.",
            "Rest in a dark and quiet room.",
            "Keep regular hours of sleep.",
        ),
        warning="the headache changes in character",
        onset=("weeks", "months"),
        ages=(18, 55),
        months=2,
    ),
    Condition(
        name="high blood pressure",
        reason="blood pressure check",
        reports=(
            "high readings on a home blood pressure monitor",
            "mild headaches in the morning and high readings at home",
            "high readings at the pharmacy and at home",
        ),
        denied=("chest pain", "shortness of breath", "swollen legs", "blurred vision"),
        findings=(
            "The heart sounds are normal.",
            "There is no swelling of the ankles.",
            "The tracing of the heart is normal.",
            "The lungs are clear.",
        ),
        treatments=(
            Treatment("amlodipine", "5 mg", "once a day"),
            Treatment("ramipril", "2.5 mg", "once a day"),
        ),
        advice=(
            "Use less salt.",
            "Walk for half an hour on most days.",
            "Measure the pressure twice a week and write it down.",
        ),
        warning="the readings stay above 160",
        onset=("weeks", "months"),
        ages=(38, 84),
        high_pressure=True,
    ),
    Condition(
        name="osteoarthritis of the {side} knee",
        reason="pain in the {side} knee",
        reports=(
            "pain in the {side} knee when climbing stairs",
            "a stiff and aching {side} knee in the morning",
            "pain in the {side} knee after walking",
        ),
        denied=("a fall or injury", "fever", "locking of the knee", "pain at night"),
        findings=(
            "The {side} knee is slightly swollen.",
            "Bending the {side} knee is painful at the end.",
            "There is no redness or warmth.",
            "The hip moves freely.",
        ),
        treatments=(
            PARACETAMOL,
            Treatment("diclofenac", "1 percent gel", "on the knee three times a day"),
        ),
        advice=(
            "Do the knee exercises every day.",
            "Losing some weight will help the knee.",
            "Swimming and cycling are good for the joint.",
        ),
        warning="the knee becomes hot or red",
        onset=("weeks", "months"),
        ages=(48, 84),
        months=3,
    ),
    Condition(
        name="strain of the lower back",
        article="a",
        reason="low back pain",
        reports=(
            "pain in the lower back after lifting a box",
            "a stiff lower back since working in the garden",
            "pain in the lower back that is worse when bending",
        ),
        denied=(
            "numbness of the legs",
            "trouble passing water",
            "fever",
            "pain that wakes {them} at night",
        ),
        findings=(
            "The muscles of the lower back are tense and tender.",
            "Raising the straight leg causes no pain.",
            "Strength in both legs is normal.",
            "Bending forward is limited by pain.",
        ),
        treatments=(IBUPROFEN, PARACETAMOL),
        advice=(
            "Stay active and avoid bed rest.",
            "Do not lift heavy things for two weeks.",
            "A warm bath may ease the pain.",
        ),
        warning="the legs become weak or numb",
        onset=("days",),
        ages=(20, 70),
    ),
    Condition(
        name="hay fever",
        reason="runny nose and itchy eyes",
        reports=(
            "sneezing and itchy eyes when outdoors",
            "a runny nose and watery eyes every spring",
            "a blocked nose and sneezing in the morning",
        ),
        denied=("fever", "wheezing", "pain in the face", "a sore throat"),
        findings=(
            "The lining of the nose is pale and swollen.",
            "Both eyes are slightly red and watery.",
            "The lungs are clear.",
            "The throat is normal.",
        ),
        treatments=(
            Treatment("cetirizine", "10 mg", "once a day"),
            Treatment("mometasone", "50 micrograms", "one spray in each nostril once a day"),
        ),
        advice=(
            "Keep the windows closed in the morning.",
            "Wash the hair before going to bed.",
            "Wear sunglasses outdoors.",
        ),
        warning="breathing becomes difficult",
        onset=("days", "weeks"),
        ages=(18, 55),
    ),
    Condition(
        name="acid reflux",
        reason="heartburn",
        reports=(
            "a burning feeling behind the breastbone after meals",
            "heartburn and a sour taste in the mouth",
            "heartburn that is worse when lying down",
        ),
        denied=("trouble swallowing", "vomiting", "black stools", "weight loss"),
        findings=(
            "The abdomen is soft.",
            "There is mild tenderness below the breastbone.",
            "No mass can be felt.",
            "The teeth and throat are normal.",
        ),
        treatments=(
            Treatment("omeprazole", "20 mg", "once a day before breakfast"),
            Treatment("famotidine", "20 mg", "at night"),
        ),
        advice=(
            "Eat small meals and avoid eating late.",
            "Raise the head of the bed.",
            "Drink less coffee and alcohol.",
        ),
        warning="swallowing becomes painful",
        onset=("weeks", "months"),
        ages=(25, 80),
        months=2,
    ),
    Condition(
        name="urinary tract infection",
        article="a",
        reason="burning on passing water",
        reports=(
            "burning on passing water",
            "a frequent need to pass water and a burning pain",
            "pain in the lower belly and cloudy urine",
        ),
        denied=("back pain", "shivering", "blood in the urine", "vomiting"),
        findings=(
            "There is mild tenderness above the bladder.",
            "There is no pain on tapping the flanks.",
            "The urine test is positive for white cells.",
            "The abdomen is soft.",
        ),
        treatments=(
            Treatment("nitrofurantoin", "100 mg", "twice a day for five days"),
            Treatment("fosfomycin", "3 g", "as a single dose"),
        ),
        advice=(
            "Drink two litres of water a day.",
            "Do not hold the urine for long.",
            "Finish the whole course.",
        ),
        warning="there is fever or back pain",
        onset=("days",),
        ages=(18, 80),
        women_only=True,
    ),
    Condition(
        name="eczema",
        reason="itchy rash",
        reports=(
            "an itchy rash on both hands",
            "dry and itchy skin in the folds of the elbows",
            "an itchy rash that disturbs {their} sleep",
        ),
        denied=("fever", "new medicines", "contact with anyone with a rash", "blisters"),
        findings=(
            "There are dry red patches on both arms.",
            "The skin is thickened from scratching.",
            "There is no sign of infection.",
            "The face and scalp are clear.",
        ),
        treatments=(
            Treatment("hydrocortisone", "1 percent cream", "twice a day for two weeks"),
            Treatment("mometasone", "0.1 percent cream", "once a day for ten days"),
        ),
        advice=(
            "Use a plain moisturiser several times a day.",
            "Avoid hot showers and scented soap.",
            "Wear cotton gloves for housework.",
        ),
        warning="the skin becomes wet or painful",
        onset=("weeks", "months"),
        ages=(18, 65),
    ),
    Condition(
        name="sprain of the {side} ankle",
        article="a",
        reason="injury of the {side} ankle",
        reports=(
            "pain in the {side} ankle after a fall on the stairs",
            "a painful {side} ankle since a wrong step while running",
            "a swollen {side} ankle after playing football",
        ),
        denied=("numbness of the foot", "a cracking sound", "other injuries", "knee pain"),
        findings=(
            "The {side} ankle is swollen on the outer side.",
            "There is no tenderness over the bones.",
            "{They} can stand and take four steps.",
            "There is a bruise below the {side} ankle.",
        ),
        treatments=(IBUPROFEN, PARACETAMOL),
        advice=(
            "Keep the leg raised and use ice for the first two days.",
            "Wear an elastic bandage for two weeks.",
            "Start to walk as soon as the pain allows.",
        ),
        warning="{they} cannot stand on the foot",
        onset=("days",),
        ages=(18, 60),
    ),
    Condition(
        name="iron deficiency",
        article="an",
        reason="tiredness",
        reports=(
            "tiredness and shortness of breath on the stairs",
            "constant tiredness and pale skin",
            "tiredness, cold hands and brittle nails",
        ),
        denied=("black stools", "weight loss", "fever", "chest pain"),
        findings=(
            "The inside of the eyelids is pale.",
            "The heart sounds are normal.",
            "The haemoglobin and the iron stores are low.",
            "The abdomen is soft.",
        ),
        treatments=(
            Treatment("ferrous sulfate", "200 mg", "once a day"),
            Treatment("ferrous gluconate", "300 mg", "twice a day"),
        ),
        advice=(
            "Take the tablets with orange juice.",
            "Eat more beans, lentils and green vegetables.",
            "The stools may become dark, which is harmless.",
        ),
        warning="{they} becomes short of breath at rest",
        onset=("weeks", "months"),
        ages=(18, 75),
        months=2,
    ),
    Condition(
        name="type 2 diabetes",
        reason="thirst",
        reports=(
            "great thirst and a frequent need to pass water",
            "thirst, tiredness and blurred vision",
            "thirst and some weight loss without trying",
        ),
        denied=("vomiting", "pain in the belly", "sores on the feet", "fever"),
        findings=(
            "The fasting blood sugar is raised.",
            "Feeling in both feet is normal.",
            "The skin of the feet is intact.",
            "The heart sounds are normal.",
        ),
        treatments=(
            Treatment("metformin", "500 mg", "twice a day with meals"),
            Treatment("gliclazide", "40 mg", "once a day with breakfast"),
        ),
        advice=(
            "Avoid sweet drinks.",
            "Look at the feet every day.",
            "Have the eyes checked once a year.",
        ),
        warning="there is vomiting or confusion",
        onset=("weeks", "months"),
        ages=(35, 80),
        months=3,
    ),
    Condition(
        name="insomnia",
        reason="poor sleep",
        reports=(
            "trouble falling asleep on most nights",
            "waking at four in the morning and lying awake",
            "poor sleep and tiredness during the day",
        ),
        denied=("low mood", "loud snoring", "pain at night", "restless legs"),
        findings=(
            "{They} looks tired but is well oriented.",
            "The thyroid gland is not enlarged.",
            "The heart sounds are normal.",
            "Speech and mood are normal.",
        ),
        treatments=(
            Treatment("melatonin", "2 mg", "one hour before bedtime"),
            Treatment("doxylamine", "25 mg", "at night for one week"),
        ),
        advice=(
            "Go to bed and get up at the same time every day.",
            "No screens in the last hour before bed.",
            "No coffee after noon.",
        ),
        warning="{their} mood becomes low",
        onset=("weeks", "months"),
        ages=(25, 84),
    ),
    Condition(
        name="asthma",
        reason="shortness of breath",
        reports=(
            "shortness of breath and wheezing at night",
            "wheezing after running",
            "a tight chest in cold air",
        ),
        denied=("fever", "chest pain", "swollen legs", "blood in the phlegm"),
        findings=(
            "There is a soft wheeze on breathing out.",
            "The peak flow is reduced.",
            "{They} can speak in full sentences.",
            "The oxygen level is normal.",
        ),
        treatments=(
            Treatment("budesonide", "200 micrograms", "two puffs twice a day"),
            Treatment("salbutamol", "100 micrograms", "two puffs when needed"),
        ),
        advice=(
            "Rinse the mouth after using the inhaler.",
            "Carry the inhaler at all times.",
            "Measure the peak flow every morning.",
        ),
        warning="the inhaler does not help",
        onset=("weeks", "months"),
        ages=(18, 60),
        months=2,
    ),
    Condition(
        name="infection of the {side} ear",
        article="an",
        reason="pain in the {side} ear",
        reports=(
            "pain in the {side} ear and poor hearing",
            "a throbbing pain in the {side} ear after a cold",
            "fever and pain in the {side} ear",
        ),
        denied=("dizziness", "a stiff neck", "discharge from the ear", "headache"),
        findings=(
            "The {side} eardrum is red and bulging.",
            "There is no swelling behind the ear.",
            "The other ear is normal.",
            "The throat is slightly red.",
        ),
        treatments=(
            Treatment("amoxicillin", "500 mg", "three times a day for seven days", penicillin=True),
            Treatment("azithromycin", "500 mg", "once a day for three days"),
        ),
        advice=(
            "Keep the ear dry.",
            "Take paracetamol for the pain.",
            "Do not fly until the ear has healed.",
        ),
        warning="there is swelling behind the ear",
        onset=("days",),
        ages=(18, 60),
        fever=True,
    ),
    Condition(
        name="tendinitis of the {side} shoulder",
        reason="pain in the {side} shoulder",
        reports=(
            "pain in the {side} shoulder when reaching up",
            "pain in the {side} shoulder when lying on it",
            "a painful {side} shoulder after painting a ceiling",
        ),
        denied=("neck pain", "numbness of the hand", "a fall or injury", "fever"),
        findings=(
            "Lifting the {side} arm to the side is painful.",
            "Strength in the {side} arm is normal.",
            "There is tenderness at the front of the {side} shoulder.",
            "The neck moves freely.",
        ),
        treatments=(
            IBUPROFEN,
            Treatment("naproxen", "250 mg", "twice a day with food"),
        ),
        advice=(
            "Avoid work above the head for three weeks.",
            "Do the pendulum exercises every day.",
            "Use ice after exercise.",
        ),
        warning="the arm becomes weak",
        onset=("weeks", "months"),
        ages=(30, 75),
    ),
    Condition(
        name="underactive thyroid",
        article="an",
        reason="tiredness and weight gain",
        reports=(
            "tiredness, dry skin and weight gain",
            "feeling cold all the time and gaining weight",
            "tiredness, slow thinking and hair loss",
        ),
        denied=("low mood", "chest pain", "trouble swallowing", "swollen legs"),
        findings=(
            "The skin is dry and cool.",
            "The thyroid gland is slightly enlarged.",
            "The reflexes are slow.",
            "The thyroid hormone is low in the blood test.",
        ),
        treatments=(
            Treatment("levothyroxine", "50 micrograms", "once a day before breakfast"),
            Treatment("levothyroxine", "25 micrograms", "once a day before breakfast"),
        ),
        advice=(
            "Take the tablet on an empty stomach.",
            "Do not take it together with iron or calcium.",
            "It may take six weeks to feel better.",
        ),
        warning="there are palpitations",
        onset=("months",),
        ages=(25, 80),
        months=2,
    ),
    Condition(
        name="conjunctivitis of the {side} eye",
        reason="red {side} eye",
        reports=(
            "a red and sticky {side} eye",
            "burning and discharge of the {side} eye",
            "a {side} eye that is glued together in the morning",
        ),
        denied=("loss of vision", "strong pain", "an injury", "contact lenses"),
        findings=(
            "The white of the {side} eye is red.",
            "There is yellow discharge at the {side} eye.",
            "Vision is normal on both sides.",
            "The pupils are equal and react to light.",
        ),
        treatments=(
            Treatment("chloramphenicol", "0.5 percent drops", "four times a day for five days"),
            Treatment("fusidic acid", "1 percent drops", "twice a day for seven days"),
        ),
        advice=(
            "Wash the hands often and use a separate towel.",
            "Clean the eye with boiled water.",
            "Throw away old eye make-up and drops.",
        ),
        warning="vision becomes blurred",
        onset=("days",),
        ages=(18, 70),
    ),
    Condition(
        name="sinusitis",
        reason="pain in the face",
        reports=(
            "a blocked nose and pressure over the cheeks",
            "pain in the face that is worse when bending forward",
            "yellow discharge from the nose and a headache",
        ),
        denied=("toothache", "swelling around the eyes", "a stiff neck", "cough"),
        findings=(
            "There is tenderness over both cheeks.",
            "There is yellow mucus in the nose.",
            "The teeth are not tender on tapping.",
            "The ears are normal.",
        ),
        treatments=(
            Treatment("doxycycline", "100 mg", "once a day for five days"),
            Treatment("amoxicillin", "500 mg", "three times a day for five days", penicillin=True),
        ),
        advice=(
            "Rinse the nose with salt water.",
            "Sleep with the head raised.",
            "Drink plenty of water.",
        ),
        warning="there is swelling around the eyes",
        onset=("days", "weeks"),
        ages=(18, 70),
        fever=True,
    ),
    Condition(
        name="gout of the {side} big toe",
        reason="pain in the {side} big toe",
        reports=(
            "sudden pain in the {side} big toe at night",
            "a hot and swollen {side} big toe",
            "a {side} big toe so painful that a blanket hurts",
        ),
        denied=("an injury", "fever", "pain in other joints", "a wound on the foot"),
        findings=(
            "The joint of the {side} big toe is red, hot and swollen.",
            "The skin of the foot is intact.",
            "The uric acid is raised in the blood test.",
            "The knees are normal.",
        ),
        treatments=(
            Treatment("colchicine", "0.5 mg", "twice a day for five days"),
            Treatment("naproxen", "500 mg", "twice a day with food"),
        ),
        advice=(
            "Drink less beer and eat less meat.",
            "Rest the foot and cool it.",
            "Drink two litres of water a day.",
        ),
        warning="there is fever or another joint swells",
        onset=("days",),
        ages=(40, 80),
    ),
    Condition(
        name="pinched nerve of the {side} wrist",
        article="a",
        reason="numbness of the {side} hand",
        reports=(
            "numbness of the {side} hand that wakes {them} at night",
            "tingling in the thumb and two fingers of the {side} hand",
            "a weak grip and tingling in the {side} hand",
        ),
        denied=("neck pain", "an injury", "weakness of the legs", "joint swelling"),
        findings=(
            "Tapping on the {side} wrist causes tingling.",
            "Feeling in the {side} thumb is reduced.",
            "The grip of the {side} hand is slightly weak.",
            "The elbow and neck move freely.",
        ),
        treatments=(
            Treatment("naproxen", "250 mg", "twice a day with food"),
            IBUPROFEN,
        ),
        advice=(
            "Wear a splint on the wrist at night.",
            "Take breaks from typing.",
            "Avoid bending the wrist for long.",
        ),
        warning="the hand becomes weaker",
        onset=("weeks", "months"),
        ages=(30, 75),
        months=2,
    ),
    Condition(
        name="stomach flu",
        reason="vomiting and diarrhoea",
        reports=(
            "vomiting and watery diarrhoea",
            "cramps in the belly and loose stools",
            "nausea and diarrhoea after a family meal",
        ),
        denied=("blood in the stools", "recent travel", "fainting", "new medicines"),
        findings=(
            "The abdomen is soft with mild tenderness all over.",
            "The mouth is slightly dry.",
            "The bowel sounds are active.",
            "The skin is warm and well filled.",
        ),
        treatments=(
            Treatment("rehydration salts", "one sachet", "after each loose stool"),
            Treatment("ondansetron", "4 mg", "up to three times a day for two days"),
        ),
        advice=(
            "Drink small amounts often.",
            "Start with rice, bananas and toast.",
            "Wash the hands well and stay at home for two days.",
        ),
        warning="{they} cannot keep fluids down",
        onset=("days",),
        ages=(18, 75),
    ),
)


class Draw:
    """The chances of one document.

    `nats` is the information of all choices so far (minus the log of their probability).
    """

    def __init__(self, seed: int, index: int) -> None:
        self._random = random.Random(f"demo notes {seed} {index}")
        self.nats = 0.0

    def one(self, options: Sequence[Item]) -> Item:
        """One of the options, all equally likely."""
        self.nats += math.log(len(options))
        return options[self._random.randrange(len(options))]

    def some(self, options: Sequence[Item], count: int) -> tuple[Item, ...]:
        """`count` different options in the order in which they are listed."""
        self.nats += math.log(math.comb(len(options), count))
        chosen = sorted(self._random.sample(range(len(options)), count))
        return tuple(options[position] for position in chosen)

    def ordered(self, options: Sequence[Item], count: int) -> tuple[Item, ...]:
        """`count` different options in any order."""
        self.nats += math.log(math.perm(len(options), count))
        return tuple(self._random.sample(options, count))

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        self.nats += math.log(high - low + 1)
        return self._random.randint(low, high)

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 cases."""
        hit = self._random.randrange(100) < percent
        self.nats -= math.log((percent if hit else 100 - percent) / 100)
        return hit


@dataclass(frozen=True, slots=True)
class Patient:
    """An invented person."""

    first_name: str
    surname: str
    woman: bool
    age: int

    @property
    def full_name(self) -> str:
        """First name and surname."""
        return f"{self.first_name} {self.surname}"

    @property
    def formal_name(self) -> str:
        """Title and surname."""
        return f"{'Ms' if self.woman else 'Mr'} {self.surname}"

    @property
    def sex(self) -> str:
        """The word used in a note's header."""
        return "female" if self.woman else "male"

    @property
    def described(self) -> str:
        """Age and sex as a phrase, such as "a 54-year-old woman"."""
        article = "an" if self.age in (18, *range(80, 90)) else "a"
        return f"{article} {self.age}-year-old {'woman' if self.woman else 'man'}"

    @property
    def slots(self) -> dict[str, str]:
        """The pronoun slots of the condition texts."""
        they, their, them = ("she", "her", "her") if self.woman else ("he", "his", "him")
        return {
            "they": they,
            "They": they.capitalize(),
            "their": their,
            "Their": their.capitalize(),
            "them": them,
        }


@dataclass(frozen=True, slots=True)
class Visit:
    """Everything that is true of one visit; each text about it is written from these facts.

    The sentences have their slots filled. `temperature` is in tenths of a degree Celsius.
    """

    patient: Patient
    doctor: str
    condition: Condition
    side: str
    date: dt.date
    next_date: dt.date
    onset: str
    symptom: str
    denied: tuple[str, str]
    allergy: str | None
    temperature: int
    pulse: int
    pressure: tuple[int, int]
    findings: tuple[str, ...]
    treatment: Treatment
    advice: str

    def fill(self, text: str) -> str:
        """`text` with the patient's pronouns and the visit's side of the body in its slots."""
        return text.format_map({**self.patient.slots, "side": self.side})

    @property
    def reason(self) -> str:
        """Why the patient came, without a capital or a full stop."""
        return self.fill(self.condition.reason)

    @property
    def assessment(self) -> str:
        """The condition, without a capital or a full stop."""
        return self.fill(self.condition.name)

    @property
    def named_assessment(self) -> str:
        """The condition with its article, for use within a sentence."""
        return f"{self.condition.article} {self.assessment}".lstrip()

    @property
    def review(self) -> str:
        """The time to the next visit, such as "two months"."""
        return ("one month", "two months", "three months")[self.condition.months - 1]

    @property
    def vitals(self) -> str:
        """Temperature, pulse and blood pressure as a sentence."""
        degrees = f"{self.temperature // 10}.{self.temperature % 10}"
        high, low = self.pressure
        return f"Temperature {degrees} C, pulse {self.pulse}, blood pressure {high}/{low}."


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """One training sample: plain text, or a chat when `turns` is not empty.

    `visit` is what it was written from; `nats` is the information of the choices made.
    """

    kind: str
    visit: Visit
    nats: float
    text: str = ""
    turns: tuple[Turn, ...] = field(default=())

    @property
    def whole_text(self) -> str:
        """All of its text, the turns of a chat one below the other."""
        return self.text or "\n".join(turn.text for turn in self.turns)


def document(seed: int, index: int) -> Document:
    """Sample number `index` of the endless stream of `seed`."""
    draw = Draw(seed, index)
    visit = draw_visit(draw)
    kind = draw.one(KINDS)
    if kind == "chat":
        turns = write_chat(draw, visit)
        return Document(kind=kind, visit=visit, nats=draw.nats, turns=turns)
    writers = {
        "note": write_note,
        "paragraph": write_paragraph,
        "follow-up": write_follow_up,
        "letter": write_letter,
        "day list": write_day_list,
    }
    text = writers[kind](draw, visit)
    return Document(kind=kind, visit=visit, nats=draw.nats, text=text)


KINDS: Final = (
    "note",
    "note",
    "note",
    "paragraph",
    "paragraph",
    "follow-up",
    "letter",
    "day list",
    "chat",
    "chat",
    "chat",
)
"""Kinds of documents, as often as they are to be drawn."""


def draw_visit(draw: Draw) -> Visit:
    """One visit whose facts fit each other."""
    condition = draw.one(CONDITIONS)
    patient = _draw_patient(draw, condition)
    side = draw.one(("left", "right"))
    slots = {**patient.slots, "side": side}
    allergy = draw.one(ALLERGENS) if draw.chance(30) else None
    fits = [
        each for each in condition.treatments if not (each.penicillin and allergy == PENICILLIN)
    ]
    date = _draw_date(draw, draw.number(FIRST_YEAR, LAST_YEAR), draw.number(1, 12))
    denied = draw.some(condition.denied, 2)
    return Visit(
        patient=patient,
        doctor=draw.one(DOCTORS),
        condition=condition,
        side=side,
        date=date,
        next_date=_draw_date(draw, *_months_later(date, condition.months)),
        onset=_draw_onset(draw, condition),
        symptom=draw.one(condition.reports).format_map(slots),
        denied=(denied[0].format_map(slots), denied[1].format_map(slots)),
        allergy=allergy,
        temperature=draw.number(381, 392) if condition.fever else draw.number(364, 371),
        pulse=2 * draw.number(44, 50) if condition.fever else 2 * draw.number(31, 41),
        pressure=_draw_pressure(draw, condition),
        findings=tuple(each.format_map(slots) for each in draw.some(condition.findings, 3)),
        treatment=draw.one(fits),
        advice=draw.one(condition.advice).format_map(slots),
    )


def _draw_patient(draw: Draw, condition: Condition) -> Patient:
    woman = condition.women_only or draw.chance(50)
    first_name = draw.one(WOMEN if woman else MEN)
    return Patient(first_name, _draw_surname(draw), woman, draw.number(*condition.ages))


def _draw_surname(draw: Draw) -> str:
    """A listed name or, as often, one put together, so that a model learns to copy new names."""
    if draw.chance(50):
        return draw.one(SURNAMES)
    return draw.one(SURNAME_STARTS) + draw.one(SURNAME_ENDS)


def _draw_date(draw: Draw, year: int, month: int) -> dt.date:
    return dt.date(year, month, draw.number(1, LAST_DAY))


def _months_later(date: dt.date, months: int) -> tuple[int, int]:
    """Year and month, `months` months after `date`."""
    years, month = divmod(date.month - 1 + months, 12)
    return date.year + years, month + 1


def _draw_onset(draw: Draw, condition: Condition) -> str:
    unit = draw.one(condition.onset)
    numbers = {
        "days": ("two", "three", "four", "five"),
        "weeks": ("two", "three", "four", "six"),
        "months": ("two", "three", "four", "six"),
    }
    return f"{draw.one(numbers[unit])} {unit}"


def _draw_pressure(draw: Draw, condition: Condition) -> tuple[int, int]:
    """Upper and lower blood pressure in mmHg."""
    if condition.high_pressure:
        return 2 * draw.number(76, 84), 2 * draw.number(46, 50)
    return 2 * draw.number(56, 67), 2 * draw.number(34, 41)


def written_date(date: dt.date) -> str:
    """A date as the notes write it, such as "4 May 2032"."""
    return f"{date.day} {MONTHS[date.month - 1]} {date.year}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _allergy_sentence(visit: Visit) -> str:
    they = visit.patient.slots["They"]
    if visit.allergy is None:
        return f"{they} has no known allergies."
    return f"{they} is allergic to {visit.allergy}."


def _denial_sentence(draw: Draw, visit: Visit) -> str:
    they = visit.patient.slots["They"]
    first, second = visit.denied
    return draw.one((f"{they} denies {first} and {second}.", f"{they} denies {first}."))


def _warning_sentence(visit: Visit) -> str:
    return visit.fill(f"{{They}} will come back sooner if {visit.condition.warning}.")


def write_note(draw: Draw, visit: Visit) -> str:
    """A visit note with a header and named sections."""
    patient = visit.patient
    opening = draw.one((patient.formal_name, "The patient"))
    began = draw.one((f"It began {visit.onset} ago.", f"This has been present for {visit.onset}."))
    history = (
        f"{opening} reports {visit.symptom}. {began} "
        f"{_denial_sentence(draw, visit)} {_allergy_sentence(visit)}"
    )
    return "\n".join(
        (
            "Visit note",
            f"Patient: {patient.full_name}",
            f"Sex: {patient.sex}",
            f"Age: {patient.age}",
            f"Date: {written_date(visit.date)}",
            f"Doctor: {visit.doctor}",
            "",
            f"Reason: {_capital(visit.reason)}.",
            f"History: {history}",
            f"Examination: {visit.vitals} {' '.join(visit.findings)}",
            f"Assessment: {_capital(visit.assessment)}.",
            f"Plan: {_capital(visit.treatment.order)}. {visit.advice} {_warning_sentence(visit)} "
            f"Review in {visit.review}.",
            f"Next visit: {written_date(visit.next_date)}",
        )
    )


def write_paragraph(draw: Draw, visit: Visit) -> str:
    """The visit as running text."""
    patient = visit.patient
    named = f"{patient.full_name}, {patient.described}"
    date = written_date(visit.date)
    opening = draw.one(
        (
            f"The patient reports {visit.symptom}.",
            f"The patient, {patient.described}, reports {visit.symptom}.",
            f"{named}, came to the clinic on {date} because of {visit.symptom}.",
            f"On {date} Dr {visit.doctor} saw {named}, who reports {visit.symptom}.",
        )
    )
    began = draw.one(
        (f"The problem began {visit.onset} ago.", f"This has been present for {visit.onset}.")
    )
    they = patient.slots["they"]
    ordered = draw.one(
        (
            f"{_capital(they)} was given {visit.treatment.order}.",
            f"The doctor prescribed {visit.treatment.order}.",
        )
    )
    return (
        f"{opening} {began} {_denial_sentence(draw, visit)} {_allergy_sentence(visit)}\n\n"
        f"On examination, the temperature is {visit.temperature // 10}.{visit.temperature % 10} C "
        f"and the pulse is {visit.pulse}. {' '.join(visit.findings)} "
        f"The picture fits {visit.named_assessment}.\n\n"
        f"{ordered} {visit.advice} {_warning_sentence(visit)} "
        f"The next visit is in {visit.review}, on {written_date(visit.next_date)}."
    )


def write_follow_up(draw: Draw, visit: Visit) -> str:
    """What was found on the day of the next visit."""
    patient = visit.patient
    they = patient.slots["They"]
    course, plan = draw.one(
        (
            ("is much better", f"Stop the {visit.treatment.medicine}. No further visit is needed."),
            (
                "feels a little better",
                f"Continue {visit.treatment.order}. {visit.advice}",
            ),
            (
                "feels no better",
                f"Continue {visit.treatment.order}. A specialist will see {patient.slots['them']}.",
            ),
        )
    )
    taken = draw.one(
        (
            f"{they} took the {visit.treatment.medicine} without side effects.",
            f"{they} took the {visit.treatment.medicine} as advised.",
        )
    )
    returned = f"{patient.formal_name} returns after treatment for {visit.named_assessment}."
    return "\n".join(
        (
            "Follow-up note",
            f"Patient: {patient.full_name}",
            f"Sex: {patient.sex}",
            f"Age: {patient.age}",
            f"Last visit: {written_date(visit.date)}",
            f"Date: {written_date(visit.next_date)}",
            f"Doctor: {visit.doctor}",
            "",
            f"History: {returned} {they} {course}. {taken}",
            f"Examination: {visit.vitals}",
            f"Plan: {plan}",
        )
    )


def write_letter(draw: Draw, visit: Visit) -> str:
    """A letter that sends the patient to another doctor."""
    patient = visit.patient
    colleague = draw.one([each for each in DOCTORS if each != visit.doctor])
    they = patient.slots["They"]
    return (
        f"Dear Dr {colleague},\n\n"
        f"Thank you for seeing {patient.full_name}, {patient.described}, who came to us on "
        f"{written_date(visit.date)} with {visit.symptom}. {_denial_sentence(draw, visit)} "
        f"{_allergy_sentence(visit)}\n\n"
        f"{' '.join(visit.findings)} We think of {visit.named_assessment} and have started "
        f"{visit.treatment.order}. {they} will be seen here again on "
        f"{written_date(visit.next_date)}.\n\n"
        f"With kind regards,\nDr {visit.doctor}"
    )


def write_day_list(draw: Draw, visit: Visit) -> str:
    """The patients of one day, as they were announced and then, in any order, as they were seen."""
    others = [_draw_patient(draw, draw.one(CONDITIONS)) for _ in range(draw.number(2, 5))]
    patients = (visit.patient, *others)
    announced = [f"{each.full_name}, {each.sex}, {each.age}" for each in patients]
    seen = [
        f"{each.formal_name}, {each.described}" for each in draw.ordered(patients, len(patients))
    ]
    return "\n".join(
        (
            "Day list",
            f"Date: {written_date(visit.date)}",
            f"Doctor: {visit.doctor}",
            "",
            *announced,
            "",
            f"Seen by Dr {visit.doctor} on {written_date(visit.date)}:",
            *seen,
        )
    )


def write_summary(visit: Visit) -> str:
    """The visit in three sentences."""
    patient = visit.patient
    return (
        f"{patient.full_name}, {patient.described}, was seen on {written_date(visit.date)} by "
        f"Dr {visit.doctor} because of {visit.symptom}. "
        f"The assessment was {visit.named_assessment}. "
        f"{patient.slots['They']} was given {visit.treatment.order}, and the next visit is on "
        f"{written_date(visit.next_date)}."
    )


def write_chat(draw: Draw, visit: Visit) -> tuple[Turn, ...]:
    """A chat about the visit: an opening, then questions that the text above answers."""
    opening = draw.one(("request", "request", "pasted", "summary", "knowledge", "greeting"))
    if opening == "knowledge":
        return _knowledge_turns(draw, visit)
    if opening == "greeting":
        greeting = _turns(draw.one(("Hello", "Hello!", "Hi", "Good morning.")), GREETING)
        return greeting + _request_turns(draw, visit) + _question_turns(draw, visit, 1)
    if opening == "pasted":
        return _pasted_turns(draw, visit) + _question_turns(draw, visit, draw.number(0, 2))
    if opening == "summary":
        asked = draw.one(("Summarise the visit of {}.", "Please summarise the visit of {}."))
        summary = _turns(asked.format(visit.patient.full_name), write_summary(visit))
        return summary + _question_turns(draw, visit, draw.number(0, 2), SUMMARY_QUESTIONS)
    return _request_turns(draw, visit) + _question_turns(draw, visit, draw.number(1, 3))


GREETING: Final = (
    "Hello. I can write a short visit note, summarise it and answer questions about it. "
    "All patients are invented."
)
QUESTIONS: Final = (
    "reason",
    "findings",
    "assessment",
    "treatment",
    "next visit",
    "date",
    "age",
    "allergy",
    "summary",
    "thanks",
)
SUMMARY_QUESTIONS: Final = ("reason", "assessment", "treatment", "next visit", "date", "thanks")
"""What a summary alone can answer."""


def _turns(question: str, answer: str) -> tuple[Turn, Turn]:
    return Turn("user", question), Turn("assistant", answer)


def _request_turns(draw: Draw, visit: Visit) -> tuple[Turn, ...]:
    patient = visit.patient
    named = f"{patient.full_name}, {patient.described}"
    asked = draw.one(
        (
            f"Write a visit note for {patient.full_name}.",
            f"Write a visit note for {named}.",
            f"Write a visit note for {named}. Reason: {visit.reason}.",
            f"Please write a visit note for {named}. Reason: {visit.reason}.",
            f"Write a visit note. Reason: {visit.reason}.",
        )
    )
    return _turns(asked, write_note(draw, visit))


def _pasted_turns(draw: Draw, visit: Visit) -> tuple[Turn, ...]:
    text = draw.one((write_note, write_letter))(draw, visit)
    asked = draw.one(("Summarise this text.", "Please summarise the text below."))
    return _turns(f"{asked}\n\n{text}", write_summary(visit))


def _knowledge_turns(draw: Draw, visit: Visit) -> tuple[Turn, ...]:
    name = visit.named_assessment
    asked, answer = draw.one(
        (
            (f"How is {name} treated?", f"A usual treatment is {visit.treatment.order}."),
            (f"What are the signs of {name}?", f"{' '.join(visit.findings)}"),
            (f"Which advice helps against {name}?", visit.advice),
            ("What was the finding?", "Please give me the note first."),
        )
    )
    return _turns(asked, answer)


def _question_turns(
    draw: Draw, visit: Visit, count: int, questions: Sequence[str] = QUESTIONS
) -> tuple[Turn, ...]:
    turns: tuple[Turn, ...] = ()
    for question in draw.ordered(questions, count):
        asked, answer = _answers(visit)[question]
        turns += _turns(draw.one(asked), answer)
    return turns


def _answers(visit: Visit) -> dict[str, tuple[tuple[str, ...], str]]:
    """For each question: the ways to ask it, and the answer."""
    patient = visit.patient
    return {
        "reason": (
            ("What was the reason for the visit?", f"Why did {patient.formal_name} come?"),
            f"{patient.formal_name} came because of {visit.symptom}.",
        ),
        "findings": (
            ("What was the finding?", "What was found?", "What did the examination show?"),
            " ".join(visit.findings),
        ),
        "assessment": (
            ("What was the assessment?", "What is the diagnosis?"),
            f"The assessment was {visit.named_assessment}.",
        ),
        "treatment": (
            ("What was prescribed?", "Which medicine was given?"),
            f"{_capital(visit.treatment.order)}.",
        ),
        "next visit": (
            ("When is the next visit?", f"When will {patient.formal_name} come back?"),
            f"The next visit is on {written_date(visit.next_date)}.",
        ),
        "date": (
            ("When was the visit?", "On which day was the visit?"),
            f"The visit was on {written_date(visit.date)}.",
        ),
        "age": (
            ("How old is the patient?", f"How old is {patient.formal_name}?"),
            f"{patient.formal_name} is {patient.age} years old.",
        ),
        "allergy": (
            ("Are there any allergies?", "Does the patient have allergies?"),
            _allergy_sentence(visit),
        ),
        "summary": (
            ("Summarise the visit.", f"Summarise the visit of {patient.full_name}."),
            write_summary(visit),
        ),
        "thanks": (("Thank you.", "Thanks!"), "You are welcome."),
    }


_UNSEEN_SEED: Final = 40127
"""Neither that of the training nor that of its held-out loss."""


if __name__ == "__main__":
    for number in range(int(sys.argv[1])):
        print(document(_UNSEEN_SEED, number).whole_text, end="\n\n")
