# SPDX-License-Identifier: Apache-2.0
"""What is refused at start stands in the documentation."""

import re
from pathlib import Path

from megatron.mapl import arguments

LIMITS = Path(__file__).parent.parent.parent / "docs" / "limits.md"


def test_limits_lists_every_flag_that_is_refused() -> None:
    listed = set(re.findall(r"`(--[\w-]+)", LIMITS.read_text()))
    refused = {flag.split()[0] for flag, _ in arguments._UNSUPPORTED.values()}
    assert refused <= listed
