"""Verdicts for other programs: a JUnit file, as continuous integration reads it, and a summary in Markdown."""

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffussm.evaluation.gate import Verdict

SUITE = "diffussm.gate"


def junit(suites: Sequence[tuple[Sequence["Verdict"], Mapping[str, str]]]) -> bytes:
    """A test suite for each thing that was judged, with a case for each verdict; the facts are its properties."""
    root = ET.Element("testsuites", _counts([verdict for verdicts, _ in suites for verdict in verdicts]))
    for verdicts, facts in suites:
        title = SUITE if len(suites) == 1 else f"{SUITE} {facts.get('checkpoint', '')}"
        suite = ET.SubElement(root, "testsuite", {"name": title, **_counts(verdicts), "skipped": "0"})
        properties = ET.SubElement(suite, "properties")
        for name, value in facts.items():
            ET.SubElement(properties, "property", {"name": name, "value": value})
        for verdict in verdicts:
            name = f"{verdict.metric} {verdict.bound} ({verdict.because})"
            case = ET.SubElement(suite, "testcase", {"classname": title, "name": name})
            if not verdict.passed:
                ET.SubElement(case, "failure", {"message": f"{verdict.metric} {verdict.found}: {verdict.bound}"})
    ET.indent(root)
    return ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _counts(verdicts: Sequence["Verdict"]) -> dict[str, str]:
    failures = sum(not verdict.passed for verdict in verdicts)
    return {"tests": str(len(verdicts)), "failures": str(failures), "errors": "0"}


def markdown(verdicts: Sequence["Verdict"], facts: Mapping[str, str]) -> str:
    """A heading that says how it ended, the verdicts as a table, the facts as a list."""
    failed = sum(not verdict.passed for verdict in verdicts)
    title = f"{failed} of {len(verdicts)} limits broken" if failed else f"all {len(verdicts)} limits held"
    header = ("", "metric", "found", "limit", "where it comes from")
    rows = [("ok" if v.passed else "**FAIL**", v.metric, v.found, v.bound, v.because) for v in verdicts]
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]
    listed = [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join([f"### Gate: {title}", "", *lines, "", *listed, ""]) + "\n"
