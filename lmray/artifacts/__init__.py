"""What is kept: immutable, content-addressed artifacts with lineage and stages, in a store behind one small port."""
