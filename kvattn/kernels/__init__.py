"""What is fast or long, one folder a framework, reached only from its tab, its layers and its part of kvattn/distributed."""
