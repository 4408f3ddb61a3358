"""label_errors.html is self-contained, escaped and marked by keys and buttons; --apply takes what it saves."""

import html
import re

import numpy as np
import pandas as pd
import pytest
from browsers import browse, check_policy, probe
from shared_fixtures import write_photo

import find_label_errors
from find_label_errors import LabelErrorConfigs
from finetune.studies.label_errors import Evidence, list_suspects, write_page

COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]
# Names that would be code, or end a field, unless they are escaped.
CLASSES = ["<script>missing()</script>", 'a, "b" & c', "plain"]
SUSPECTS = 4


def make_evidence(folder, multi_label=False):
    """Returns twelve photos, four of each colour; the first four have a wrong label."""
    rng, names = np.random.default_rng(0), [f'<b onclick="missing()">{number}\' , .jpg' for number in range(12)]
    files = [str(folder / "photos" / f"{number}.jpg") for number in range(12)]
    truth = np.arange(12) % 3
    for file, position in zip(files, truth, strict=True):
        write_photo(file, COLOURS[position], rng)
    labels = np.where(np.arange(12) < SUSPECTS, (truth + 1) % 3, truth)
    probabilities = np.full((12, 3), 0.05) + np.eye(3)[truth] * 0.85
    probabilities[:SUSPECTS] += np.eye(3)[truth[:SUSPECTS]] * 0.01 * np.arange(SUSPECTS, 0, -1)[:, None]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    features = (np.eye(3)[truth] * 5 + rng.random((12, 3))).astype(np.float32)
    texts = [CLASSES[label] for label in labels]
    labels = np.eye(3, dtype=np.uint8)[labels] if multi_label else labels
    return Evidence(np.arange(2, 14), names, files, texts, labels, features, probabilities)


def make_page(folder, multi_label=False):
    evidence = make_evidence(folder, multi_label)
    configs = LabelErrorConfigs(
        csv_path=str(folder / "all_data.csv"), classes=CLASSES, multi_label_classification=multi_label
    )
    found = list_suspects(evidence, CLASSES, 500)
    pd.DataFrame({"path": evidence.names, "class": evidence.texts}).to_csv(configs.csv_path, index=False)
    write_page(str(folder / "label_errors.html"), found, evidence, "About 4 are wrong.", configs.csv_path, configs)
    return folder / "label_errors.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return make_page(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def multi_page(tmp_path_factory):
    return make_page(tmp_path_factory.mktemp("multi"), multi_label=True)


def test_page_is_self_contained_runs_only_its_own_script_and_shows_names_as_text(page):
    source = page.read_text(encoding="utf-8")
    check_policy(source, "data:")
    sources = re.findall(r' src="([^"]+)"', source)
    # Each photo has three neighbours.
    assert len(sources) == SUSPECTS * 4
    assert all(one.startswith("data:image/jpeg;base64,") for one in sources)
    assert not any(code in source for code in ("<script>missing", "<b onclick"))
    assert "&lt;script&gt;missing()&lt;/script&gt;" in source


def test_most_doubtful_labels_come_first_with_their_neighbours(page):
    cards = [html.unescape(card) for card in re.findall(r"<article.*?</article>", page.read_text(), re.S)]
    assert len(cards) == SUSPECTS
    for rank, card in enumerate(cards, start=1):
        assert f"{rank} · row {rank + 1} · <b onclick" in card
        given, likely = re.search(r"<dd>(.*?)</dd>", card)[1], re.search(r"<dd><strong>(.*?)</strong>", card)[1]
        assert given == CLASSES[rank % 3]
        assert likely == CLASSES[(rank - 1) % 3]
        # The three other photos of this colour are nearest.
        others = [int(number) for number in re.findall(r"Similar photo <b onclick=\"missing\(\)\">(\d+)'", card)]
        assert sorted([*others, rank - 1]) == [number for number in range(12) if number % 3 == (rank - 1) % 3]


# In a browser


PROBE = """<script>
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const active = () => document.activeElement.dataset.position;
const found = {};
// Reading a blob is asynchronous, and the page may be read before it ends.
Blob = class extends Blob {
  constructor(parts, options) { super(parts, options); found.saved = parts.join(""); }
};
URL.createObjectURL = blob => { found.bytes = blob.size; return "#saved"; };
HTMLAnchorElement.prototype.click = function () { found.name = this.download; };
window.addEventListener("load", () => {
  try {
    STEPS
    found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    found.broken = Array.from(document.images).filter(image => !image.naturalWidth).length;
    found.count = document.getElementById("count").textContent;
    document.getElementById("save").click();
    found.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  } catch (error) { found.error = String(error); }
  document.title = JSON.stringify(found);
});
</script></body>"""


def run_steps(page, folder, steps, *flags):
    """Returns what `PROBE` finds on a page after these steps."""
    found = probe(page, folder, PROBE.replace("STEPS", steps), *flags)
    assert (found["overflow"], found["broken"], found["name"]) == (0, 0, "corrections.csv")
    assert found["bytes"] == len(found["saved"].encode())
    return found


def test_browser_opens_the_page_without_an_error(page):
    document, console = browse(page)
    assert "0 of 4 marked: 0 right, 0 wrong, 0 unsure" in document
    assert console == []


def test_keys_mark_and_what_is_saved_is_applied(page, tmp_path):
    steps = """
    press("r"); found.first = active();
    press("w"); found.second = active();
    press("R"); press("u"); press("j"); found.last = active();
    press("k"); press("u"); found.taken_back = cards[2].dataset.mark;
    press("w"); found.choice = cards[2].querySelector(".choice").hidden;
    press("c"); const select = document.activeElement;
    press("r");
    found.focused = select.tagName; found.options = Array.from(select.options, option => option.value);
    found.selected = select.value;
    """
    found = run_steps(page, tmp_path, steps)
    # The first key moves to the first card, and each mark to the next one.
    assert (found["first"], found["second"], found["last"], found["taken_back"]) == ("0", "1", "3", "")
    assert found["choice"] is False
    # The given label cannot be chosen, and the likely one is selected.
    assert found["focused"] == "SELECT"
    assert len(found["options"]) == 2
    assert found["count"] == "4 of 4 marked: 1 right, 3 wrong, 0 unsure (not saved)"
    table = page.parent / "all_data.csv"
    (tmp_path / "corrections.csv").write_text(found["saved"])
    options = {"csv_path": str(table), "apply": str(tmp_path / "corrections.csv")}
    counts = find_label_errors.main(LabelErrorConfigs(**options, write_path=str(tmp_path / "new.csv")))
    assert counts == {"right": 1, "wrong": 3, "unsure": 0}
    before, after = pd.read_csv(table), pd.read_csv(tmp_path / "new.csv")
    changed = np.flatnonzero(before["class"] != after["class"])
    assert changed.tolist() == [0, 2, 3]
    assert after["class"][changed].tolist() == [CLASSES[0], CLASSES[2], CLASSES[0]]


def test_buttons_mark_on_a_dark_phone_and_another_class_is_chosen(page, tmp_path):
    steps = """
    cards[1].querySelector("button[data-mark=wrong]").click();
    found.pressed = cards[1].querySelector("button[data-mark=wrong]").getAttribute("aria-pressed");
    found.next = active();
    const select = cards[1].querySelector("select");
    select.value = data.classes[0]; select.dispatchEvent(new Event("change"));
    cards[0].querySelector("button[data-mark=unsure]").click();
    cards[0].querySelector(".photo").click();
    """
    found = run_steps(page, tmp_path, steps, "--window-size=390,800", "--force-dark-mode")
    assert (found["pressed"], found["next"], found["dark"]) == ("true", "2", True)
    lines = pd.read_csv(pd.io.common.StringIO(found["saved"]))
    assert lines["mark"].tolist() == ["unsure", "wrong"]
    assert lines["row"].tolist() == [2, 3]
    assert lines["corrected_label"].tolist() == [lines["given_label"][0], CLASSES[0]]


def test_several_labels_are_chosen(multi_page, tmp_path):
    steps = """
    press("r"); press("c");
    const select = document.activeElement;
    for (const option of select.options) option.selected = option.index > 0;
    select.dispatchEvent(new Event("change"));
    """
    found = run_steps(multi_page, tmp_path, steps)
    lines = pd.read_csv(pd.io.common.StringIO(found["saved"]))
    assert lines["corrected_label"].tolist() == [f"{CLASSES[1]}${CLASSES[2]}"]
