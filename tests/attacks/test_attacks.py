"""Every attack is refused or held. The attacks are in the modules beside this one, each of which also runs by itself:
`python -m tests.attacks.NAME`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.attacks.attack import HELD, Attack, all_attacks

_ATTACKS = all_attacks()


@pytest.mark.parametrize("attack", _ATTACKS, ids=[f"{one.module}-{one.name}" for one in _ATTACKS])
def test_an_attack_fails(attack: Attack, tmp_path: Path) -> None:
    outcome = attack.run(tmp_path)
    assert outcome == HELD or outcome.startswith("refused: ")


def test_each_attack_says_what_it_tries() -> None:
    assert [one.name for one in _ATTACKS if not one.tries.endswith(".") or one.tries == "None."] == []
