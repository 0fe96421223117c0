//! Splitting text into pieces. Merges never cross the boundary between two pieces.

use std::sync::Arc;

use fancy_regex::Regex;

use crate::dfa::Dfa;
use crate::error::Error;
use crate::scan::scan;

/// GPT-4's pattern, but with numbers in groups of at most two digits, so that numbers do not use up a small vocabulary.
pub const DEFAULT_PATTERN: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// Cuts text into pieces by a pattern. A clone shares the compiled pattern.
#[derive(Clone, Debug)]
pub struct Splitter {
    pattern: String,
    engine: Arc<Engine>,
    keep_gaps: bool,
}

/// The engine that finds the pieces: the fastest that the pattern allows. All engines find the same pieces.
#[derive(Debug)]
enum Engine {
    /// The hand-written scanner for the default pattern.
    Scanner,
    /// An automaton; the regex finds the next match where the automaton has none.
    Dfa(Box<Dfa>, Regex),
    Regex(Regex),
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let engine = if pattern == DEFAULT_PATTERN {
            Engine::Scanner
        } else {
            let regex = compile(pattern)?;
            match Dfa::new(pattern) {
                Some(dfa) => Engine::Dfa(Box::new(dfa), regex),
                None => Engine::Regex(regex),
            }
        };
        Ok(Self { pattern: pattern.to_owned(), engine: Arc::new(engine), keep_gaps: false })
    }

    /// Sets whether text that a custom pattern does not match becomes pieces, as in Hugging Face's `Isolated` split.
    pub fn keep_gaps(self, keep_gaps: bool) -> Self {
        Self { keep_gaps, ..self }
    }

    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Calls `piece(start, end)` with the byte range of each piece in turn. Text that a custom pattern does not match
    /// is dropped, as in tiktoken, unless `keep_gaps` is set; the default pattern matches everything.
    pub fn split(&self, text: &str, mut piece: impl FnMut(usize, usize)) -> Result<(), Error> {
        match &*self.engine {
            Engine::Scanner => scan(text, piece),
            Engine::Dfa(dfa, regex) => {
                let mut done = 0;
                while done < text.len() {
                    let (start, end) = match dfa.match_at(text, done) {
                        Some(end) => (done, end),
                        None => match regex.find_from_pos(text, done).map_err(split_error)? {
                            Some(found) => (found.start(), found.end()),
                            None => break,
                        },
                    };
                    self.gap(done, start, &mut piece);
                    piece(start, end);
                    done = end;
                }
                self.gap(done, text.len(), &mut piece);
            }
            Engine::Regex(regex) => {
                let mut done = 0;
                for found in regex.find_iter(text) {
                    let found = found.map_err(split_error)?;
                    self.gap(done, found.start(), &mut piece);
                    if !found.as_str().is_empty() {
                        piece(found.start(), found.end());
                    }
                    done = found.end();
                }
                self.gap(done, text.len(), &mut piece);
            }
        }
        Ok(())
    }

    fn gap(&self, start: usize, end: usize, piece: &mut impl FnMut(usize, usize)) {
        if self.keep_gaps && start < end {
            piece(start, end);
        }
    }
}

fn split_error(error: fancy_regex::Error) -> Error {
    Error::Split(error.to_string())
}

pub(crate) fn compile(pattern: &str) -> Result<Regex, Error> {
    Regex::new(pattern).map_err(|error| Error::Pattern(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::dfa::tests::all as patterns;

    fn pieces(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        splitter.split(text, |start, end| out.push(text[start..end].to_owned())).unwrap();
        out
    }

    /// The engines that support a pattern, fastest first, the regex engine last.
    fn engines(pattern: &str) -> Vec<Splitter> {
        let with = |engine| Splitter { pattern: pattern.to_owned(), engine: Arc::new(engine), keep_gaps: false };
        let regex = || compile(pattern).unwrap();
        let scanner = (pattern == DEFAULT_PATTERN).then_some(Engine::Scanner);
        let dfa = Dfa::new(pattern).map(|dfa| Engine::Dfa(Box::new(dfa), regex()));
        scanner.into_iter().chain(dfa).chain([Engine::Regex(regex())]).map(with).collect()
    }

    static DEFAULT: LazyLock<Vec<Splitter>> = LazyLock::new(|| engines(DEFAULT_PATTERN));
    static ALL: LazyLock<Vec<Vec<Splitter>>> = LazyLock::new(|| patterns().map(engines).collect());

    fn check(engines: &[Splitter], text: &str) {
        let (regex, others) = engines.split_last().unwrap();
        let expected = pieces(regex, text);
        for other in others {
            assert_eq!(pieces(other, text), expected, "{} on {text:?}", other.pattern);
        }
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
        for character in '\0'..=char::MAX {
            // All of the first planes, and a sample of the rest, which is mostly unassigned.
            if (character as u32) < 0x3400 || (character as u32).is_multiple_of(61) {
                let text = format!("a{character}1'{character} {character}\n {character}");
                check(&DEFAULT, &text);
            }
        }
    }

    #[test]
    fn custom_pattern_drops_what_it_does_not_match() {
        assert_eq!(pieces(&Splitter::new("[a-z]*").unwrap(), "ab1cd"), ["ab", "cd"]);
        assert!(matches!(Splitter::new("(a"), Err(Error::Pattern(_))));
    }

    #[test]
    fn gaps_are_kept_on_demand() {
        for splitter in engines("[a-z]+") {
            assert_eq!(pieces(&splitter, "1ab2 3cd4"), ["ab", "cd"]);
            assert_eq!(pieces(&splitter.keep_gaps(true), "1ab2 3cd4"), ["1", "ab", "2 3", "cd", "4"]);
        }
    }

    const HARD: &str = "[ '\\t\\r\\n/\u{a0}\u{2028}aSsLlVvEeRrTſK1٣½.$é\u{301}中😀]{0,40}";

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn default_pattern_on_any_text(text in "\\PC*") {
            check(&DEFAULT, &text);
        }

        #[test]
        fn default_pattern_on_hard_text(text in HARD) {
            check(&DEFAULT, &text);
        }

        #[test]
        fn words_and_their_ends(words in prop::collection::vec(" ?[a-zA-Zé']{0,20}[ .é\n]?", 0..8)) {
            check(&DEFAULT, &words.concat());
        }

        #[test]
        fn all_patterns_on_hard_text(text in HARD) {
            for engines in ALL.iter() {
                check(engines, &text);
            }
        }
    }
}
