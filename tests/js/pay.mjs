// Scenarios of a payer in Node with the unmodified SDKs: each line of the input is JSON, and is answered by a line of
// JSON.

import { createServer } from "node:http";
import { createInterface } from "node:readline";
import { wrapFetchWithPaymentFromConfig } from "@x402/fetch";
import { Mppx } from "mppx/client";
import { Channel, mpp, x402 } from "paychan";

let way, given, channel, saved;

/** Begin with a channel from JSON. */
function begin(task) {
  way = task.way;
  given = task;
  saved = [];
  channel = new Channel(given.channel, (json) => {
    if (given.disk_is_full) throw new Error("disk is full");
    saved.push(json);
  });
}

/** The SDK's fetch with the plug-in. */
function paying(options = {}) {
  const limits = { maxSat: 1000, ...options };
  if (way === "x402") {
    const { config, watch } = x402([channel], limits);
    return wrapFetchWithPaymentFromConfig(watch(fetch), config);
  }
  const { method, around } = mpp([channel], limits);
  return around(Mppx.create({ methods: [method], polyfill: false }).fetch);
}

const decoded = (header) => JSON.parse(Buffer.from(header, "base64"));
const encoded = (value) => Buffer.from(JSON.stringify(value)).toString(way === "x402" ? "base64" : "base64url");

/** The payment in the headers of a request: change value and signature; null without one. */
function paymentOf(headers) {
  const header = headers["payment-signature"] ?? headers.authorization?.replace("Payment ", "");
  return header === undefined ? null : decoded(header).payload;
}

/** A seller that answers by `answer(payment, response)`; `seen` are the payments that it got. */
async function seller(answer) {
  const seen = [];
  const server = createServer((request, response) => {
    const payment = paymentOf(request.headers);
    if (payment !== null) seen.push(payment);
    answer(payment, response);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const close = () => {
    server.close();
    server.closeAllConnections();
  };
  return { url: `http://127.0.0.1:${server.address().port}/v1/tile`, seen, close };
}

/** A 402 of the gateway, changed by `change(offer)`: an entry of `accepts`, or the request of the challenge. */
async function offered(change = (offer) => [offer]) {
  const headers = (await fetch(given.url)).headers;
  if (way === "x402") {
    const required = decoded(headers.get("PAYMENT-REQUIRED"));
    return { "PAYMENT-REQUIRED": encoded({ ...required, accepts: change(required.accepts[0]) }) };
  }
  const header = headers.get("WWW-Authenticate");
  const [, request] = /request="([^"]+)"/.exec(header);
  return { "WWW-Authenticate": change(decoded(request)).map((each) => header.replace(request, encoded(each))) };
}

/** Add the claim to an offer that a payment was accepted and used up, with `signature` as its proof. */
function withState(offer, payment, signature = payment.signature) {
  const { outpoint, fundingSat, expiry } = channel.facts;
  const proof = { changeSat: payment.changeSat, sighash: payment.sighash, signature };
  const sum = String(fundingSat - Number(payment.changeSat));
  if (way === "mpp") {
    const shown = {
      channelId: outpoint,
      deposit: String(fundingSat),
      acceptedCumulative: sum,
      spent: sum,
      credit: "0",
      expiry,
    };
    return {
      ...offer,
      methodDetails: { ...offer.methodDetails, sessionSnapshot: { ...shown, highestVoucher: proof } },
    };
  }
  const channelState = {
    channel: outpoint,
    capacitySat: String(fundingSat),
    changeSat: payment.changeSat,
    acceptedCumulativeSat: sum,
    spentSat: sum,
    creditSat: "0",
    expiry,
  };
  return { ...offer, extra: { ...offer.extra, channelState, voucherState: proof } };
}

const shown = async (response) => ({ status: response.status, body: await response.text() });

/** What a fetch did: the answer, or the error with the errors that caused it. */
async function outcome(promise) {
  try {
    return await shown(await promise);
  } catch (error) {
    const named = [error, error.cause].find((each) => each?.code);
    return { error: error.message, code: named?.code ?? null };
  }
}

const scenarios = {
  /** Get each of `paths`, one after the other. */
  async sequence() {
    const pay = paying(given.options),
      answers = [];
    for (const path of given.paths) answers.push(await outcome(pay(new URL(path, given.url), given.init)));
    return { answers };
  },

  /** Get all of `paths` at once. */
  async together() {
    const pay = paying();
    return { answers: await Promise.all(given.paths.map((path) => outcome(pay(new URL(path, given.url))))) };
  },

  /** A seller that refuses each payment, and says what `given.lie` names. */
  async loop() {
    const stranger = new Channel({ ...given.channel, privateKey: "11".repeat(32) }, () => {});
    const lies = {
      nothing: (offer) => offer,
      spent: withState,
      forged: (offer, payment) => withState(offer, payment, stranger.sign(Number(payment.changeSat)).signature),
    };
    const { url, seen, close } = await seller(async (payment, response) => {
      const change = payment === null ? undefined : (offer) => [lies[given.lie](offer, payment)];
      response.writeHead(402, await offered(change)).end();
    });
    const pay = paying(),
      answers = [];
    for (let number = 0; number < given.times; number++) answers.push(await outcome(pay(url)));
    close();
    return { answers, seen };
  },

  /** A seller whose offers are of other bindings; the own one is the last if `given.own`. */
  async foreign() {
    const { url, seen, close } = await seller(async (payment, response) => {
      if (payment !== null) return response.end("paid");
      response
        .writeHead(
          402,
          await offered((offer) => [
            way === "x402"
              ? { ...offer, extra: { assetTransferMethod: "gobtc-rails-preauthorized-psbt" } }
              : { ...offer, methodDetails: { ...offer.methodDetails, binding: "another" } },
            ...(given.own ? [offer] : []),
          ]),
        )
        .end();
    });
    const answer = await outcome(paying()(url));
    close();
    return { answer, seen };
  },

  /** A seller that ends the connection when it is paid; then the gateway, with the same channel. */
  async lost() {
    const { url, seen, close } = await seller(async (payment, response) => {
      if (payment !== null) response.destroy();
      else response.writeHead(402, await offered()).end();
    });
    const pay = paying();
    const answers = [await outcome(pay(url)), await outcome(pay(given.url))];
    close();
    return { answers, seen };
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  begin(JSON.parse(line));
  const result = await scenarios[given.scenario]();
  console.log(JSON.stringify({ ...result, saved, channel }));
}
