# SPDX-License-Identifier: Apache-2.0

"""Files of the repository as pages of the site, and what Markdown does not know of our docstrings."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WHOLE_FILE = re.compile(r'^--8<-- "(\w+\.md)"$', re.MULTILINE)
LINK_IN_REPOSITORY = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)[^)]+\)")
ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>~?([^<]+)</code>")
DEFAULT = re.compile(r",\s*default:\s*<code>.*?</code>", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Include a file of the repository, whose links to other files of it lead nowhere on the site."""
    return WHOLE_FILE.sub(lambda name: LINK_IN_REPOSITORY.sub(r"\1", (ROOT / name[1]).read_text()), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show a role such as ``:class:`X` `` as code, ``::`` before a block as one colon, and each default once."""
    return DEFAULT.sub("", ROLE.sub(r"<code>\1</code>", html)).replace("::</p>", ":</p>")
