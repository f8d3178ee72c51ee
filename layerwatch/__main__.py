"""`python -m layerwatch`."""

from .cli import main

raise SystemExit(main())
