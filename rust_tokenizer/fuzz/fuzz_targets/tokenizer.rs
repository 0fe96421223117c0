//! Trains on, encodes and decodes the fuzzer's input, and compares the results with the simplest implementations.
//!
//!     cargo install cargo-fuzz
//!     cargo fuzz run --sanitizer none tokenizer -- -max_total_time=600 -len_control=0 -max_len=400
//!
//! `--sanitizer none` allows a stable compiler. The crate has no `unsafe` code that a sanitizer could check.

#![no_main]

use std::collections::HashMap;
use std::num::NonZero;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use jaxchat_tokenizer::count::Counter;
use jaxchat_tokenizer::decode::Decoder;
use jaxchat_tokenizer::encode::Encoder;
use jaxchat_tokenizer::split::{DEFAULT_PATTERN, Splitter};
use jaxchat_tokenizer::train::learn;
use jaxchat_tokenizer::vocab::Vocabulary;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    texts: Vec<String>,
    /// How often each text is repeated, so that a few bytes of input make long pieces.
    times: u8,
    pattern: u8,
    merges: u8,
    /// Tokens that swap ranks, so that the vocabulary is one that training would not produce.
    swaps: Vec<(u8, u8)>,
    keep_gaps: bool,
    custom: String,
}

/// For each pattern, a splitter that may use any engine and one that must use the regex engine: a group around the
/// whole pattern does not change its meaning, but no automaton can be built when the group contains a look-ahead.
static PATTERNS: LazyLock<Vec<(Splitter, Splitter)>> = LazyLock::new(|| {
    let patterns = [
        DEFAULT_PATTERN,
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        r"[\p{L}\p{M}]+|\p{N}|\s+(?!\S)",
        r"(?s:.)+(?!(?s:.))",
    ];
    let splitter = |pattern: &str| Splitter::new(pattern).expect("the pattern is valid");
    patterns.iter().map(|pattern| (splitter(pattern), splitter(&format!("(?:{pattern})")))).collect()
});

fn pieces(splitter: &Splitter, text: &str) -> Vec<(usize, usize)> {
    let mut pieces = Vec::new();
    splitter.split(text, |start, end| pieces.push((start, end))).expect("the patterns hardly backtrack");
    pieces
}

/// Training that recounts all pairs for each merge.
fn plain_training(pieces: &[&str], size: usize) -> Vec<Vec<u8>> {
    let mut words: Vec<Vec<u32>> = pieces.iter().map(|piece| piece.bytes().map(u32::from).collect()).collect();
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    while tokens.len() < size {
        let mut counts: HashMap<(u32, u32), u64> = HashMap::new();
        words
            .iter()
            .flat_map(|word| word.windows(2))
            .for_each(|pair| *counts.entry((pair[0], pair[1])).or_default() += 1);
        let best = counts.into_iter().max_by_key(|&(pair, count)| (count, std::cmp::Reverse(pair)));
        let Some(((left, right), _)) = best else { break };
        for word in &mut words {
            let mut at = 0;
            while at + 1 < word.len() {
                if (word[at], word[at + 1]) == (left, right) {
                    word.splice(at..at + 2, [tokens.len() as u32]);
                }
                at += 1;
            }
        }
        tokens.push([&tokens[left as usize][..], &tokens[right as usize]].concat());
    }
    tokens
}

/// tiktoken's definition: merge the two neighbours that form the lowest token, leftmost first, until no two form one.
fn plain_encoding(ids: &HashMap<&[u8], u32>, piece: &[u8]) -> Vec<u32> {
    if let Some(&id) = ids.get(piece) {
        return vec![id];
    }
    let mut ends: Vec<usize> = (0..=piece.len()).collect();
    while let Some((_, at)) =
        (1..ends.len() - 1).filter_map(|at| ids.get(&piece[ends[at - 1]..ends[at + 1]]).map(|&id| (id, at))).min()
    {
        ends.remove(at);
    }
    ends.windows(2).map(|pair| ids[&piece[pair[0]..pair[1]]]).collect()
}

fuzz_target!(|input: Input| {
    // Any pattern either compiles or is rejected; it never panics.
    if let Ok(custom) = Splitter::new(&input.custom) {
        for text in &input.texts {
            _ = custom.split(text, |_, _| {});
        }
    }

    let (fast, regex) = &PATTERNS[usize::from(input.pattern) % PATTERNS.len()];
    let texts: Vec<String> = input.texts.iter().map(|text| text.repeat(1 + usize::from(input.times) % 16)).collect();
    if texts.iter().map(String::len).sum::<usize>() > 2000 {
        return;
    }
    let mut counter = Counter::default();
    let mut all_pieces = Vec::new();
    for text in &texts {
        let expected = pieces(regex, text);
        assert_eq!(pieces(fast, text), expected, "{text:?}");
        counter.add_text(fast, text).expect("it was split above");
        all_pieces.extend(expected.into_iter().map(|(start, end)| &text[start..end]));
    }
    let size = 256 + usize::from(input.merges) % 64;
    let mut tokens = learn(&counter.finish(), size, usize::MAX, |_| false).expect("the text is small");
    assert_eq!(tokens, plain_training(&all_pieces, size));

    for &(left, right) in &input.swaps {
        let count = tokens.len();
        tokens.swap(usize::from(left) % count, count - 1 - usize::from(right) % count);
    }
    let ids: HashMap<&[u8], u32> = tokens.iter().enumerate().map(|(id, token)| (&token[..], id as u32)).collect();
    let splitter = fast.clone().keep_gaps(input.keep_gaps);
    let encoder =
        Encoder::new(splitter, Vocabulary::new(tokens.clone()).expect("only the order of the tokens has changed"));
    let decoder = Decoder::new(tokens.iter().map(Vec::as_slice));
    for threads in [1, 2] {
        let encoded = encoder.encode(&texts, None, None, NonZero::new(threads)).expect("it was split above");
        for (range, text) in encoded.offsets.windows(2).zip(&texts) {
            let found = &encoded.ids[range[0] as usize..range[1] as usize];
            let kept = pieces(regex, text);
            if !input.keep_gaps {
                let expected: Vec<u32> =
                    kept.iter().flat_map(|&(start, end)| plain_encoding(&ids, &text.as_bytes()[start..end])).collect();
                assert_eq!(found, expected);
            }
            let decoded = decoder.decode(found, None).expect("the ids are in range");
            if input.keep_gaps {
                assert_eq!(decoded, text.as_bytes());
            } else {
                assert_eq!(decoded, kept.iter().map(|&(start, end)| &text[start..end]).collect::<String>().as_bytes());
            }
        }
    }
});
