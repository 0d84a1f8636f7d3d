# SPDX-License-Identifier: Apache-2.0

"""What Markdown does not know of our docstrings: Sphinx's roles, double colons, and defaults that the text names."""

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>~?([^<]+)</code>")
DEFAULT = re.compile(r",\s*default:\s*<code>.*?</code>", re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Show a role such as ``:class:`X` `` as code, ``::`` before a block as one colon, and each default once."""
    return DEFAULT.sub("", ROLE.sub(r"<code>\1</code>", html)).replace("::</p>", ":</p>")
