//! Where a conversation is longer than the context: which of its oldest messages the prompt leaves out.

use serde_json::Value;

use crate::api::{Message, SessionError};
use crate::records::KnownItem;
use crate::rendering::Prompt;

/// What a prompt shows of a conversation whose oldest messages are left out. System messages always stay. Messages are
/// counted through, the session's before the input's.
pub(crate) struct Shown {
    pub items: Vec<KnownItem>,
    pub input: Vec<Message>,
}

/// Whether the message with this index is left out when the conversation begins at `begin`.
pub(crate) fn is_left_out(index: usize, message: &Message, begin: usize) -> bool {
    index < begin && role(message) != "system"
}

/// The longest end of the conversation that `plan` finds room for, and its prompt; None when not even the last message
/// fits. A conversation begins with a person's words: an answer or a tool's output without its question means nothing.
pub(crate) fn shorten(
    items: &[KnownItem],
    input: &[Message],
    mut plan: impl FnMut(&Shown) -> Result<Option<Prompt>, SessionError>,
) -> Result<Option<(usize, Prompt)>, SessionError> {
    let messages: Vec<&Message> = items.iter().map(|item| &item.message).chain(input).collect();
    let last = messages.len().saturating_sub(1);
    let begins: Vec<usize> =
        (1..messages.len()).filter(|index| *index == last || role(messages[*index]) == "user").collect();
    let (mut low, mut high) = (0, begins.len());
    let mut best = None;
    while low < high {
        let middle = (low + high) / 2;
        match plan(&from(items, input, begins[middle]))? {
            Some(prompt) => {
                best = Some((begins[middle], prompt));
                high = middle;
            }
            None => low = middle + 1,
        }
    }
    Ok(best)
}

fn from(items: &[KnownItem], input: &[Message], begin: usize) -> Shown {
    let stays = |index: usize, message: &Message| !is_left_out(index, message, begin);
    let kept = items.iter().enumerate().filter(|(index, item)| stays(*index, &item.message));
    let new = input.iter().enumerate().filter(|(index, message)| stays(items.len() + index, message));
    Shown {
        items: kept.map(|(_, item)| item.clone()).collect(),
        input: new.map(|(_, message)| message.clone()).collect(),
    }
}

fn role(message: &Message) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::message;

    fn words(shown: &Shown) -> usize {
        shown.input.iter().map(|message| crate::records::content(message).len()).sum()
    }

    fn shortened(input: &[Message], room: usize) -> Option<usize> {
        let prompt = || Prompt {
            keep_tokens: 0,
            tokens: Vec::new(),
            keep_items: 0,
            ranges: Vec::new(),
            end: String::new(),
        };
        let found = shorten(&[], input, |shown| Ok((words(shown) <= room).then(prompt))).unwrap();
        found.map(|(begin, _)| begin)
    }

    #[test]
    fn the_oldest_messages_go_first_and_a_question_is_what_remains_first() {
        let input = [
            message("system", "s"),
            message("user", "one"),
            message("assistant", "two"),
            message("tool", "out"),
            message("user", "three"),
            message("assistant", "four"),
            message("user", "five"),
        ];
        assert_eq!(shortened(&input, 14), Some(4));
        assert_eq!(shortened(&input, 13), Some(6));
        assert_eq!(shortened(&input, 5), Some(6));
        assert_eq!(shortened(&input, 4), None);
        assert!(!is_left_out(0, &input[0], 6));
        assert!(is_left_out(3, &input[3], 4) && !is_left_out(4, &input[4], 4));
    }

    #[test]
    fn one_message_cannot_be_shortened() {
        assert_eq!(shortened(&[message("user", "hello")], 3), None);
    }
}
