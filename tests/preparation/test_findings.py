"""How findings are reported: what is broken first, and leaks, of which there may be many, last and in short."""

from preparation.findings import CHECK, LEAK, SHOWN_LEAKS, UNREADABLE, Finding, report


def test_many_leaks_do_not_bury_other_findings(tmp_path, capsys):
    leaks = [Finding(LEAK, f"test/{i:03d}.png", "is nearly the same") for i in range(115)]
    others = [Finding(CHECK, "parts", "has one training image"), Finding(UNREADABLE, "a.png", "is damaged")]
    assert report(leaks + others, tmp_path / "findings.txt")
    lines = (tmp_path / "findings.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == [UNREADABLE, CHECK, *[LEAK] * 115]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith((CHECK, LEAK))]
    assert printed[0] == "to check: parts: has one training image"
    assert len(printed) == 1 + SHOWN_LEAKS + 1
    assert f"and {115 - SHOWN_LEAKS} more" in printed[-1]
