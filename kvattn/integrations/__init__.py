"""kvattn inside other people's libraries: one file a library, loaded only when it is asked for."""
