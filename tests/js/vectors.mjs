// Reads the vectors as a payer does: each line of the input is a header, each line of the output is its meaning.

import { createInterface } from "node:readline";
import { decodePaymentRequiredHeader, decodePaymentResponseHeader } from "@x402/core/http";
import { Challenge } from "mppx";
import { Channel, mppOffer, mppReceipt, paymentDigest, redeemScript, x402Offers, x402Settled } from "paychan";

const hex = (text) => Uint8Array.from(Buffer.from(text, "hex"));

const readers = {
  "PAYMENT-REQUIRED": ({ value }) => x402Offers(decodePaymentRequiredHeader(value)),
  "PAYMENT-RESPONSE": ({ value }) => x402Settled(decodePaymentResponseHeader(value)),
  "WWW-Authenticate": ({ value }) =>
    Challenge.fromHeadersList(new Headers({ "WWW-Authenticate": value }))
      .filter(({ method, intent }) => method === "bitcoin" && intent === "session")
      .map(mppOffer),
  "Payment-Receipt": ({ value }) => mppReceipt(value),
  /** The payment that the channel signs for this change value, and whether it has signed the one that is shown. */
  payment: ({ channel, payment }) => {
    const signer = new Channel(channel, () => {});
    const isAmount = Number.isSafeInteger(Number(payment.changeSat)) && /^\d+$/.test(payment.changeSat);
    return { signed: isAmount ? signer.sign(Number(payment.changeSat)) : null, isOwn: signer.hasSigned(payment) };
  },
  digest: ({ server, client, expiry, outpoint, change_script, change_sat }) => {
    const script = redeemScript(hex(server), hex(client), expiry);
    return {
      script: Buffer.from(script).toString("hex"),
      digest: Buffer.from(paymentDigest(script, outpoint, hex(change_script), change_sat)).toString("hex"),
    };
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const task = JSON.parse(line);
  let answer;
  try {
    answer = { meaning: readers[task.header](task) };
  } catch (error) {
    answer = { refused: error.code ?? error.message };
  }
  console.log(JSON.stringify(answer));
}
