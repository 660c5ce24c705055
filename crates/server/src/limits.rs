//! How much a key may ask: requests a minute, and requests at once.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::{Body, HttpBody};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use dormouse_session::ApiKey;
use futures::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::ApiError;

/// The limits of one key, and what is used of them. They begin anew with the server.
#[derive(Debug, Default)]
pub struct Limits {
    rate: Option<Mutex<Bucket>>,
    places: Option<(u32, Arc<Semaphore>)>,
}

/// A key that asks for more than it may: what, and after how long it may ask again.
#[derive(Debug, PartialEq)]
pub struct Exceeded {
    message: String,
    retry_after: Duration,
}

impl Limits {
    pub fn of(key: &ApiKey) -> Limits {
        let places = key.concurrency.map(|most| (most, Arc::new(Semaphore::new(most as usize))));
        Limits { rate: key.requests_per_minute.map(|most| Mutex::new(Bucket::full(most))), places }
    }

    /// Counts one request. The place, if places are counted, is to be kept until its answer is sent.
    pub fn admit(&self, now: Instant) -> Result<Option<OwnedSemaphorePermit>, Exceeded> {
        let place = match &self.places {
            None => None,
            Some((most, places)) => Some(Arc::clone(places).try_acquire_owned().map_err(|_| Exceeded {
                message: format!("this API key may have {most} requests on their way at once, and has"),
                retry_after: Duration::from_secs(1),
            })?),
        };
        if let Some(bucket) = &self.rate {
            // A bucket is a number and a time, each always right.
            bucket.lock().unwrap_or_else(PoisonError::into_inner).take(now)?;
        }
        Ok(place)
    }
}

/// A bucket of requests that fills up in a minute.
#[derive(Debug)]
struct Bucket {
    most: u32,
    left: f64,
    /// None before the first request.
    at: Option<Instant>,
}

impl Bucket {
    fn full(most: u32) -> Bucket {
        Bucket { most, left: f64::from(most), at: None }
    }

    fn take(&mut self, now: Instant) -> Result<(), Exceeded> {
        let per_second = f64::from(self.most) / 60.0;
        let passed = self.at.map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        self.at = Some(now);
        self.left = (self.left + passed * per_second).min(f64::from(self.most));
        if self.left < 1.0 {
            return Err(Exceeded {
                message: format!("this API key may ask {} times a minute, and has", self.most),
                retry_after: Duration::from_secs_f64((1.0 - self.left) / per_second),
            });
        }
        self.left -= 1.0;
        Ok(())
    }
}

impl IntoResponse for Exceeded {
    fn into_response(self) -> Response {
        // Whole seconds, not less than it takes.
        let seconds = self.retry_after.as_secs_f64().ceil().max(1.0) as u64;
        let message = format!("{}; try again in {seconds} s", self.message);
        let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, Some("rate_limit_exceeded"), message);
        let mut response = error.into_response();
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        response
    }
}

/// The response, which keeps the place until its last byte is sent or its client is gone.
pub fn keep_until_sent(response: Response, place: OwnedSemaphorePermit) -> Response {
    if response.body().size_hint().exact().is_some() {
        // It is there already; nothing more is done for it.
        return response;
    }
    response.map(|body| {
        Body::from_stream(body.into_data_stream().map(move |frame| {
            let _held_while_streaming = &place;
            frame
        }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream;

    fn limits(requests_per_minute: Option<u32>, concurrency: Option<u32>) -> Limits {
        let key = ApiKey {
            id: "key_1".into(),
            object: "api_key",
            name: "k".into(),
            tenant: "t".into(),
            scopes: Vec::new(),
            requests_per_minute,
            concurrency,
            created_at: 0,
            revoked_at: None,
        };
        Limits::of(&key)
    }

    #[test]
    fn a_minute_holds_as_many_requests_as_the_key_may_and_time_gives_them_back() {
        let limits = limits(Some(6), None);
        let start = Instant::now();
        assert!((0..6).all(|_| limits.admit(start).is_ok()));
        let refused = limits.admit(start).unwrap_err().into_response();
        assert_eq!(
            (refused.status().as_u16(), &refused.headers()["retry-after"]),
            (429, &"10".parse().unwrap())
        );
        assert!(limits.admit(start + Duration::from_secs(9)).is_err());
        assert!(limits.admit(start + Duration::from_secs(10)).is_ok());
        assert!(limits.admit(start + Duration::from_secs(10)).is_err());
        let much_later = start + Duration::from_secs(10_000);
        assert!((0..6).all(|_| limits.admit(much_later).is_ok()) && limits.admit(much_later).is_err());
    }

    #[tokio::test]
    async fn a_place_is_taken_until_the_stream_is_over() {
        let limits = limits(None, Some(1));
        let place = limits.admit(Instant::now()).unwrap().unwrap();
        let body = Body::from_stream(stream::iter([Ok::<_, std::io::Error>("a"), Ok("b")]));
        let response = keep_until_sent(Response::new(body), place);
        assert!(limits.admit(Instant::now()).is_err());
        axum::body::to_bytes(response.into_body(), 10).await.unwrap();
        let place = limits.admit(Instant::now()).unwrap().unwrap();
        let whole = keep_until_sent(Response::new(Body::from("whole")), place);
        assert!(limits.admit(Instant::now()).is_ok(), "a whole answer holds nothing");
        drop(whole);
    }
}
