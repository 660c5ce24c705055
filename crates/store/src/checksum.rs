//! CRC-32C over the columns of a row, so that a flipped bit in a row is seen when it is read.

/// Feeds the columns of a row, each with its length, in a fixed order.
pub(crate) struct RowChecksum(u32);

impl RowChecksum {
    /// `table` separates rows of different tables that happen to hold the same columns.
    pub(crate) fn of(table: &str) -> RowChecksum {
        RowChecksum(0).bytes(table.as_bytes())
    }

    pub(crate) fn bytes(self, bytes: &[u8]) -> RowChecksum {
        let length = crc32c::crc32c_append(self.0, &(bytes.len() as u64).to_le_bytes());
        RowChecksum(crc32c::crc32c_append(length, bytes))
    }

    pub(crate) fn text(self, text: &str) -> RowChecksum {
        self.bytes(text.as_bytes())
    }

    pub(crate) fn optional(self, text: Option<&str>) -> RowChecksum {
        match text {
            Some(text) => self.number(1).text(text),
            None => self.number(0),
        }
    }

    pub(crate) fn number(self, number: i64) -> RowChecksum {
        RowChecksum(crc32c::crc32c_append(self.0, &number.to_le_bytes()))
    }

    pub(crate) fn finish(self) -> u32 {
        self.0
    }
}
