"""Files of Python packages, fetched without pip. Needs only Python's standard library; PIP_INDEX_URL is respected."""

import hashlib
import html.parser
import os
import shutil
import sys
import urllib.parse
import urllib.request


class Links(html.parser.HTMLParser):
    """The addresses on an index page."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        if tag == "a":
            self.addresses.append(dict(attributes).get("href") or "")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(package, name, target):
    """Writes the file `name` of `package` to `target`, and ends the program where it is not what the index says it is."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    page_address = f"{index}/{package}/"
    with urllib.request.urlopen(page_address, timeout=60) as page:
        links = Links()
        links.feed(page.read().decode())
    named = [urllib.parse.urljoin(page_address, address).partition("#") for address in links.addresses]
    found = [(address, fragment) for address, _, fragment in named if address.endswith("/" + name)]
    if not found:
        sys.exit(f"{index} does not list {name}")
    address, fragment = found[0]
    print(f"fetching {address}")
    with urllib.request.urlopen(address, timeout=60) as answer, open(target, "wb") as file:
        shutil.copyfileobj(answer, file, 1 << 20)
    if sha256(target) != fragment.removeprefix("sha256="):
        sys.exit(f"{name} has not the sum that the index names; run {sys.argv[0]} again")
