"""kvattn beyond one machine: one file an engine, loaded only when it is asked for."""
