"""Under `make soak` a failure is reported at once, with what repeats it; shrinking can wait until somebody looks."""

from __future__ import annotations

import os

from hypothesis import Phase, settings

settings.register_profile("soak", phases=(Phase.explicit, Phase.generate), database=None, print_blob=True)
if os.environ.get("FZG_SOAK") == "1":
    settings.load_profile("soak")
