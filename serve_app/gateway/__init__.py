"""One address for every model: routes a request, and moves a broken stream to another replica."""
