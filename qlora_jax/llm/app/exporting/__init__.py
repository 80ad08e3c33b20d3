"""What `qlora-jax export` uses: the formats, and the files of servers."""
