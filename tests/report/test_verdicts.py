"""What other programs read of a gate: JUnit's XML and Markdown."""

import xml.etree.ElementTree as ET

from diffussm.evaluation.gate import Verdict
from diffussm.report.verdicts import junit, markdown

VERDICTS = [
    Verdict("FID", 5.5, "max", 6.0, "gate.fid_max"),
    Verdict("recall", 0.25, "min", 0.5, "baseline <0.8 & more>"),
    Verdict("IS", None, "min", 9.0, "gate.is_min"),
]
FACTS = {"checkpoint": 'runs/"a" & <b>'}


def test_junit_has_a_case_for_each_verdict_and_a_failure_for_each_that_is_broken():
    root = ET.fromstring(junit([(VERDICTS, FACTS)]))
    assert root.tag == "testsuites" and (root.get("tests"), root.get("failures")) == ("3", "2")
    assert root.find("testsuite/properties/property").get("value") == FACTS["checkpoint"]
    cases = root.findall("testsuite/testcase")
    assert [case.find("failure") is None for case in cases] == [True, False, False]
    assert cases[1].get("name") == "recall at least 0.5 (baseline <0.8 & more>)"
    assert cases[1].find("failure").get("message") == "recall 0.25: at least 0.5"


def test_junit_has_a_suite_for_each_thing_that_was_judged():
    root = ET.fromstring(junit([(VERDICTS, FACTS), (VERDICTS[:1], {})]))
    assert (root.get("tests"), root.get("failures")) == ("4", "2")
    assert [suite.get("failures") for suite in root.findall("testsuite")] == ["2", "0"]
    cases = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(set(cases)) == 4


def test_the_summary_begins_with_how_it_ended_and_has_a_row_for_each_verdict():
    heading, _, header, rule, *rows = markdown(VERDICTS, FACTS).splitlines()
    assert heading == "### Gate: 2 of 3 limits broken"
    assert header.count("|") == rule.count("|") == 6
    assert rows[:3] == [
        "| ok | FID | 5.5 | at most 6 | gate.fid_max |",
        "| **FAIL** | recall | 0.25 | at least 0.5 | baseline <0.8 & more> |",
        "| **FAIL** | IS | not measured | at least 9 | gate.is_min |",
    ]
    assert "- checkpoint: " in rows[4]
    assert markdown(VERDICTS[:1], {}).startswith("### Gate: all 1 limits held\n")
