# SPDX-License-Identifier: Apache-2.0

"""Docstrings have Sphinx's roles and double colons, which Markdown does not know."""

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>~?([^<]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Show a role such as ``:class:`X` `` as code, and ``::`` before a block as one colon."""
    return ROLE.sub(r"<code>\1</code>", html).replace("::</p>", ":</p>")
