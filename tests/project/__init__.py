"""What surrounds the code: documents, packaging, containers, continuous integration."""
