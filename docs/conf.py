"""The documentation site: `make docs` builds it from these pages and the docstrings."""
from timm_rla import __version__

project = 'timm_rla'
author = copyright = 'the authors of timm_rla'
release = version = __version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
exclude_patterns = ['_build']
highlight_language = 'text'  # of blocks that name none: commands
html_theme = 'furo'
html_title = f'timm_rla {version}'
myst_heading_anchors = 3
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
autodoc_member_order = 'bysource'
linkcheck_ignore = [r'https://openreview.net/.*']  # refuses programs


def setup(app):
    """Leave out the fields of named tuples, of which Python says no more than their numbers."""
    app.connect('autodoc-skip-member', lambda app, what, name, member, skip, options: (
        skip or str(getattr(member, '__doc__', '')).startswith('Alias for field number')))
