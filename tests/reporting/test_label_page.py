"""data_report.html shows copies of a photo with different labels."""

import re

import numpy as np
from shared_fixtures import write_photo

from configs import Configs
from finetune.data.near_copies import Copies, NearPair, Place
from finetune.data.tables import ImageTable
from finetune.reporting.label_page import write_contradictions


def test_copies_with_different_labels_are_shown_and_an_old_page_is_removed(tmp_path, capsys):
    names = [f"{number}.jpg" for number in range(5)]
    files = [str(tmp_path / name) for name in names]
    for file in files:
        write_photo(file, (200, 40, 40), np.random.default_rng(0))
    table = ImageTable("training", "all.csv", names, files, ["cat", "dog", "dog", "owl", "owl"])
    row = [Place(table, number) for number in range(2, 7)]
    # Rows 3 and 4 are exact copies, and row 2 is a near copy of them. Rows 5 and 6 agree.
    copies = Copies([[row[0]], [row[1], row[2]], [row[3], row[4]]], [NearPair(0, 1, 0.99)])
    write_contradictions(str(tmp_path / "run"), copies, False, Configs())
    path = tmp_path / "run" / "data_report.html"
    assert str(path) in capsys.readouterr().out
    # Of the three copies only row 2 has the less frequent label.
    (card,) = re.findall(r"<article.*?</article>", path.read_text(encoding="utf-8"), re.S)
    assert re.findall("<dd>(.*?)</dd>", card) == ["cat", "<strong>dog</strong>", "66.7\u00a0%"]
    assert "row 2 · 0.jpg" in card
    assert re.findall('alt="Similar photo (.*?)"><span>(.*?)<', card) == [("1.jpg", "dog"), ("2.jpg", "dog")]
    assert "--csv_path all.csv --apply corrections.csv" in path.read_text(encoding="utf-8")
    write_contradictions(str(tmp_path / "run"), Copies(copies.places[2:], []), False, Configs())
    assert not path.exists()
