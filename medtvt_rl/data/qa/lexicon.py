"""The words by which texts name findings, laboratory deviations and diseases.

Owns: the vocabulary of validation, as pieces of regular expressions. Does not own: how a clause is read (concepts.py),
or the phrases of the answers themselves (data/labels.py), which are part of it. Of two entries that match at one place
the first counts, so that the narrower one stands first.
"""

from __future__ import annotations

import re

from medtvt_rl.data.labels import DISEASES, PHRASES
from medtvt_rl.data.labs import LAB_IDS, LAB_ITEMS
from medtvt_rl.data.simulate.findings import LAB_THRESHOLDS
from medtvt_rl.rewards.synonyms import SYNONYMS

FINDING_OF = {
    "atrial fibrillation": "afib",
    "tachycardia": "tachycardia",
    "left ventricular hypertrophy": "lvh",
    "st depression": "st_depression",
    "q waves or infarct": "q_wave",
    "peaked t waves": "peaked_t",
    "cardiomegaly": "cardiomegaly",
    "consolidation": "consolidation",
    "pleural effusion": "effusion",
    "edema": "edema",
}
"""Concept -> the finding of data/labels.py that it shows."""

_ECG = {
    "paced rhythm": r"pac(?:ed|emaker) (?:rhythm|complex(?:es)?)|(?:atrial|ventricular|demand|dual)[- ]?pac(?:ed|ing)",
    "atrial flutter": r"atrial flutter",
    "tachycardia": r"tachycardia|rapid ventricular (?:response|rate)|tachycardic",
    "bradycardia": r"bradycardia|slow ventricular (?:response|rate)|bradycardic",
    "premature beats": r"premature (?:\w+ )?(?:complex|beat|contraction)\w*|ectop\w+|bigeminy|trigeminy|PVCs?|PACs?",
    "left bundle branch block": r"(?:incomplete )?left bundle[- ]branch block|LBBB",
    "right bundle branch block": r"(?:incomplete )?right bundle[- ]branch block|RBBB",
    "fascicular block": r"(?:anterior|posterior)? ?(?:hemi|fascicular )block|bifascicular block",
    "av block": r"(?:1st|2nd|3rd|first|second|third)[- ]degree (?:a-?v|atrioventricular)[- ]block|a-?v block|"
    r"prolonged pr interval|pr prolongation",
    "conduction delay": r"(?:intra)?-?ventricular conduction (?:delay|defect)|prolonged qrs",
    "left ventricular hypertrophy": r"left ventricular hypertrophy|LVH",
    "right ventricular hypertrophy": r"right ventricular hypertrophy|RVH",
    "atrial enlargement": r"(?:left|right)? ?atrial (?:enlargement|abnormality)",
    "left axis deviation": r"left(?:ward)? axis(?: deviation)?",
    "right axis deviation": r"right(?:ward)? axis(?: deviation)?",
    "prolonged qt": r"prolonged qtc?(?: interval)?|qtc? prolongation|long qtc?",
    "st depression": r"(?:st|j-?point)(?:[- ]segments?)? depression|depressed st(?: segments?)?",
    "st elevation": r"(?:st|j-?point)(?:[- ]segments?)? elevation|elevated st(?: segments?)?|STEMI",
    "peaked t waves": r"(?:peaked|tall|hyperacute)(?: narrow)? t[- ]waves?",
    "st or t changes": r"st[-/ ]?t(?:[- ]wave)? (?:wave )?(?:change|abnormalit)\w*|"
    r"t[- ]wave (?:change|abnormalit|inversion|flattening)\w*|inverted t[- ]waves?|repolari[sz]ation abnormalit\w+|"
    r"st[- ]?(?:segment )?(?:change|abnormalit)\w*",
    "q waves or infarct": r"(?:pathologic(?:al)? |abnormal |deep )?q[- ]waves?|(?:myocardial )?infarct(?:ion)?|"
    r"(?-i:MI)",
    "ischemia": r"ischa?emia|ischa?emic(?! heart disease)",
    "poor r progression": r"(?:poor|delayed|slow|abnormal) r[- ]wave progression",
    "low voltage": r"low (?:qrs )?voltages?",
    "pericarditis": r"pericarditis",
    "pre-excitation": r"pre-?excitation|wolff[- ]parkinson[- ]white|WPW",
    "sinus rhythm": r"(?:normal |regular )?sinus rhythm|regular rhythm with P waves",
}
_CXR = {
    "enlarged cardiomediastinum": r"enlarged cardiomediastin\w+|widen(?:ed|ing)(?: of the)? mediastin\w+|"
    r"mediastinal widening",
    "cardiomegaly": r"cardiomegaly|enlarged (?:heart|cardiac silhouette)|(?:heart|cardiac silhouette)(?: is)? enlarged|"
    r"cardiac enlargement",
    "consolidation": r"consolidations?|focal airspace opacity",
    "edema": r"pulmonary o?edema|perihilar (?:haze|o?edema)|vascular congestion|o?edema",
    "pleural effusion": r"(?:pleural )?effusions?|blunted costophrenic angles?|costophrenic blunting",
    "pneumothorax": r"pneumothora(?:x|ces)",
    "atelectasis": r"atelecta\w+",
    "fracture": r"fractures?",
    "lung lesion": r"(?:lung|pulmonary) (?:lesion|nodule|mass)\w*|nodules?",
    "pleural other": r"pleural (?:other|thickening|plaques?)|other pleural \w+",
    "support devices": r"support devices?|endotracheal tube|catheters?|pacemaker leads?|central line",
    "lung opacity": r"(?:lung |airspace |pulmonary )?opacit(?:y|ies)|infiltrates?|opacification",
}
_NOT_HYPERTENSION = r"(?<!pulmonary )(?<!portal )(?<!intracranial )"
_LAB_WORDS = {
    "50802": r"base (?:excess|deficit)",
    "50804": r"total CO2",
    "50813": r"lactate|lactic acid",
    "50818": r"pCO2",
    "50820": r"pH",
    "50821": r"pO2",
    "50861": r"ALT|alanine (?:amino)?transaminase",
    "50863": r"ALP",
    "50878": r"AST|aspartate (?:amino)?transaminase|aspartate aminotransferase",
    "50882": r"HCO3",
    "50885": r"(?:total )?bilirubin",
    "50893": r"(?:total )?calcium",
    "50910": r"CK",
    "50970": r"phosphorus",
    "51006": r"BUN|blood urea nitrogen",
    "51237": r"INR",
    "51265": r"platelets?",
    "51274": r"prothrombin time",
    "51275": r"partial thromboplastin time|aPTT",
    "51279": r"red (?:blood )?cells?|RBC",
    "51301": r"white (?:blood )?cells?(?: count)?|WBC",
}
"""Other words for an item, beside its own name and the phrases of data/labels.py."""

DERIVED = {
    "50931 high": r"hyperglyc[ae]?emia",
    "50931 low": r"hypoglyc[ae]?emia",
    "50971 high": r"hyperkal[ae]?emia",
    "50971 low": r"hypokal[ae]?emia",
    "50983 high": r"hypernatr[ae]?emia",
    "50983 low": r"hyponatr[ae]?emia",
    "50893 high": r"hypercalc[ae]?emia",
    "50893 low": r"hypocalc[ae]?emia",
    "50970 high": r"hyperphosphat[ae]?emia",
    "50960 low": r"hypomagnes[ae]?emia",
    "50862 low": r"hypoalbumin[ae]?emia",
    "51222 low": r"an[ae]?emia",
    "51301 high": r"leu[ck]ocytosis",
    "51301 low": r"leu[ck]openia",
    "51265 low": r"thrombocytopenia",
    "51265 high": r"thrombocytosis",
    "50820 low": r"acid[ae]?emia",
    "50820 high": r"alkal[ae]?emia",
}
"""Deviation ("ITEM high") -> one word for it."""


def disease_concept(name: str) -> str:
    """The concept of a disease."""
    return name.lower()


def _diseases() -> dict[str, str]:
    words = {disease_concept(name): [re.escape(name)] for name in DISEASES}
    for synonym, normal in SYNONYMS.items():
        # Short forms are names in capitals only: "af" may be the end of a line, "AF" is not.
        short = len(synonym) <= 5 and " " not in synonym
        words[normal].append(f"(?-i:{re.escape(synonym.upper())})" if short else re.escape(synonym))
    words["hypertension"] = [_NOT_HYPERTENSION + word for word in words["hypertension"]]
    words["sepsis"] += ["septic shock", "septic"]
    return {name: "|".join(sorted(pieces, key=len, reverse=True)) for name, pieces in words.items()}


def _labs() -> dict[str, str]:
    names: dict[str, list[str]] = {}
    for item in LAB_IDS:
        short = re.search(r"\((\w+)\)$", LAB_ITEMS[item])
        plain = re.sub(r"\s*\(\w+\)$", "", LAB_ITEMS[item])
        if len(plain) > 1:
            names[item] = [re.escape(LAB_ITEMS[item]), re.escape(plain), *([short[1]] if short else [])]
            names[item] += [_LAB_WORDS[item]] if item in _LAB_WORDS else []
    for key, (item, _) in LAB_THRESHOLDS.items():
        names[item] += [re.escape(phrase.rsplit(" ", 1)[0]) for phrase in PHRASES[key]]
    return {item: "|".join(sorted(set(pieces), key=len, reverse=True)) for item, pieces in names.items()}


CONCEPTS: dict[str, str] = {**_diseases(), **_ECG, **_CXR}
"""Concept -> the words that name it; fibrillation and pneumonia are at once a finding and a disease."""

CONCEPT_OF_PHRASE: dict[str, str] = {
    phrase.lower(): concept for concept, key in FINDING_OF.items() for phrase in PHRASES[key]
}
"""A phrase of data/labels.py, in lower case -> the concept that it names."""

LAB_NAMES: dict[str, str] = _labs()
"""Item id -> the words that name it."""

LAB_PHRASES: dict[str, str] = {
    f"{item} {key.rsplit('_', 1)[1]}": PHRASES[key][0] for key, (item, _) in LAB_THRESHOLDS.items()
}
"""Deviation -> the phrase of data/labels.py that names it."""
