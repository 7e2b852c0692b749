"""Models: where they come from, in which precision they load, and the few facts the rest of lmray needs of them."""
