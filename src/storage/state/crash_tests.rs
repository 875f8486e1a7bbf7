//! The map through crashes: at every step of its writing, and through damage of its files.
