//! Errors, with messages written for the user.

use std::fmt;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The pattern does not compile.
    Pattern(String),
    /// The regex engine gave up on a text, as backtracking engines may.
    Split(String),
    /// The tokens do not form a valid vocabulary.
    Vocabulary(String),
    /// Texts in Arrow's layout are damaged; `source` is the caller's name for their origin.
    Texts { source: String, why: String },
    /// No token has this id.
    Id { id: i64, size: usize },
    /// The distinct pieces exceed what 32-bit positions can address.
    TooLarge,
    /// The caller asked to stop.
    Interrupted,
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Some engines print the pattern across several lines.
            Self::Pattern(why) => write!(out, "the split pattern does not compile: {}", one_line(why)),
            Self::Split(why) => write!(out, "the split pattern fails on this text: {}", one_line(why)),
            Self::Vocabulary(why) => out.write_str(why),
            Self::Texts { source, why } => write!(out, "{source} cannot be read: {why}"),
            Self::Id { id, size } => {
                write!(out, "token id {id} is out of range: this tokenizer has ids 0 to {}", size - 1)
            }
            Self::TooLarge => out.write_str("the distinct pieces of this text exceed 4 GB; train on part of it"),
            Self::Interrupted => out.write_str("interrupted"),
        }
    }
}

impl std::error::Error for Error {}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
