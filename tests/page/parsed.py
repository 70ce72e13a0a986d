"""A page as a browser takes it apart."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image


class ParsedPage(HTMLParser):
    """Attributes by tag, all text, and whether every tag is closed in turn."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def images(self, dark=False):
        """(attributes, decoded image) of every img of the light page, or of those that only the dark page has."""
        for tag, attributes in self.tags:
            if tag == "img" and (attributes.get("class") == "dark") == dark:
                _, data = attributes["src"].split(";base64,")
                image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                image.load()
                yield attributes, image
