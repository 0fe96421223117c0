//! Byte-pair encoding: splitting text by a pattern, learning merges, encoding and decoding.
//!
//! The core is pure Rust. `py.rs` is the Python binding, enabled by the `python` feature.

pub mod classes;
pub mod count;
pub mod decode;
pub mod dfa;
pub mod encode;
pub mod error;
pub mod piece_key;
#[cfg(feature = "python")]
mod py;
pub mod scan;
pub mod split;
pub mod threads;
pub mod train;
pub mod vocab;
