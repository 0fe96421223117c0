//! Splitting text into pieces. Merges never cross the border between two pieces.

use fancy_regex::Regex;

use crate::error::Error;
use crate::scan::scan;

/// GPT-4's pattern with numbers in groups of at most two, so that a small vocabulary is not spent on numbers.
pub const DEFAULT_PATTERN: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// Cuts text into pieces by a pattern.
#[derive(Debug)]
pub struct Splitter {
    pattern: String,
    /// None for the default pattern, which a scanner by hand splits 12 times as fast as the regex.
    regex: Option<Regex>,
    keep_gaps: bool,
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let regex = if pattern == DEFAULT_PATTERN { None } else { Some(compile(pattern)?) };
        Ok(Self { pattern: pattern.to_owned(), regex, keep_gaps: false })
    }

    /// Makes pieces of the text that a custom pattern does not match, as Hugging Face's `Isolated` split does.
    pub fn keep_gaps(self, keep_gaps: bool) -> Self {
        Self { keep_gaps, ..self }
    }

    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Calls `piece(start, end)` with the bytes of each piece in turn. Text that a custom pattern does not match is
    /// left out, as it is by tiktoken, unless `keep_gaps` says otherwise; the default pattern matches everything.
    pub fn split(&self, text: &str, mut piece: impl FnMut(usize, usize)) -> Result<(), Error> {
        match &self.regex {
            None => scan(text, piece),
            Some(regex) => {
                let mut done = 0;
                for found in regex.find_iter(text) {
                    let found = found.map_err(|error| Error::Split(error.to_string()))?;
                    if self.keep_gaps && done < found.start() {
                        piece(done, found.start());
                    }
                    if !found.as_str().is_empty() {
                        piece(found.start(), found.end());
                    }
                    done = found.end();
                }
                if self.keep_gaps && done < text.len() {
                    piece(done, text.len());
                }
            }
        }
        Ok(())
    }
}

pub(crate) fn compile(pattern: &str) -> Result<Regex, Error> {
    Regex::new(pattern).map_err(|error| Error::Pattern(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    fn pieces(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        splitter.split(text, |start, end| out.push(text[start..end].to_owned())).unwrap();
        out
    }

    static REGEX: LazyLock<Regex> = LazyLock::new(|| compile(DEFAULT_PATTERN).unwrap());

    fn regex_pieces(text: &str) -> Vec<String> {
        REGEX.find_iter(text).map(|found| found.unwrap().as_str().to_owned()).collect()
    }

    #[test]
    fn known_pieces() {
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        assert_eq!(
            pieces(&splitter, "I'll pay $1234.5!\n\n  Don'T\tgo  "),
            ["I", "'ll", " pay", " $", "12", "34", ".", "5", "!\n\n", " ", " Don", "'T", "\tgo", "  "]
        );
        assert_eq!(pieces(&splitter, ""), [""; 0]);
    }

    #[test]
    fn every_character_alone_and_between_others() {
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        for character in '\0'..=char::MAX {
            // All of the first planes, a sample of the rest, which is empty for the most part.
            if (character as u32) < 0x3400 || (character as u32).is_multiple_of(61) {
                let text = format!("a{character}1'{character} {character}\n {character}");
                assert_eq!(pieces(&splitter, &text), regex_pieces(&text), "{:x}", character as u32);
            }
        }
    }

    #[test]
    fn custom_pattern_drops_what_it_does_not_match() {
        assert_eq!(pieces(&Splitter::new("[a-z]*").unwrap(), "ab1cd"), ["ab", "cd"]);
        assert!(matches!(Splitter::new("(a"), Err(Error::Pattern(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn scanner_equals_regex_on_any_text(text in "\\PC*") {
            prop_assert_eq!(pieces(&Splitter::new(DEFAULT_PATTERN).unwrap(), &text), regex_pieces(&text));
        }

        #[test]
        fn scanner_equals_regex_on_hard_text(text in "[ '\\t\\r\\n\\u{a0}\\u{2028}aSsLlVvEeRrTſK1٣½.$é\\u{301}中😀]{0,40}") {
            prop_assert_eq!(pieces(&Splitter::new(DEFAULT_PATTERN).unwrap(), &text), regex_pieces(&text));
        }
    }
}
