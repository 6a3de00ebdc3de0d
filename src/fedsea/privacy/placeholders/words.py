"""Small lists of words that tell names, places and organisations from ordinary words.

Written by hand from general knowledge; they are a beginning, not a register.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _phrases(text: str) -> frozenset[str]:
    return frozenset(
        phrase.strip() for phrase in " ".join(text.split()).split(",") if phrase.strip()
    )


TITLES = _words("""
    mr mrs ms miss mister dr doctor prof professor sir madam dame lord lady rev reverend fr father sister
    brother capt captain col colonel lt sgt sergeant gen general major judge justice senator president
    chancellor minister officer nurse herr frau fräulein monsieur mme mlle madame mademoiselle señor señora
    sr sra srta signor signora sig don doña dhr mevr mw pan pani hr fru uncle aunt grandma grandpa king
    queen prince princess saint
""")

GIVEN_NAMES = _words("""
    aaron abdul abigail adam adrian agnes agnieszka ahmed aisha alan albert alejandro aleksandra alessandro
    alex alexander alexandra alexis alfred ali alice alicia alison allison alma amanda amara amber amelia amelie
    amir amit amy ana anastasia anders andrea andreas andrei andrew andrzej angel angela anil anita anja ann
    anna anne annette annika anthony anton antonio arjun arnold arthur arturo asha astrid aurora austin ava
    barbara bartosz beatrice beatriz ben benjamin bernard bert beth betty bianca bill birgit bjorn bob bogdan
    boris brandon brenda brian bridget bruce bruno caleb cameron camila camille carl carla carlos carmen carol
    carolina caroline catherine cecilia charles charlie charlotte chen chloe chris christian christina
    christine christopher cindy claire clara claude claudia clemens colin connor conrad constance craig
    cristina cynthia dagmar daisy dan daniel daniela danielle danny dario david dawn debbie deborah declan
    denis dennis derek diana diane diego dieter dimitri dmitri dolores dominic donald donna dora doris
    dorothy douglas duncan dylan edgar edith eduardo edward edwin eileen elaine elena eleanor elias elisa
    elisabeth elise elizabeth ella ellen elsa elsie emil emilia emily emma enrique enzo eric erica erik erika
    erin ernest esther ethan eugene eva evan eve evelyn fabian fatima federico felicia felipe felix fernando
    fiona florence florian frances francesca francis francisco franco frank franz fred frederick frieda
    friedrich fritz gabriel gabriela gareth gary gavin gemma george georgia gerald gerard gerda gerhard
    giorgio giovanni giulia giuseppe gloria gordon grace graham greg gregory greta guido guillermo gunnar
    gustav hanna hannah hans harold harriet harry hassan hazel heather hector heidi heinrich heinz helen
    helena helga henri henrik henry herbert herman hiroshi holly howard hugh hugo ian ibrahim ida ignacio
    igor ilse imran ines ingrid irene irina iris isaac isabel isabella isabelle ivan jack jacob jacqueline
    jacques jakob jakub james jamie jan jana jane janet janice jasmine jason javier jean jeff jeffrey
    jennifer jenny jens jeremy jesse jessica jill jim joan joanna joao joe joel johan johanna johannes john
    johnny jon jonas jonathan jordan jorge jose josef joseph josephine joshua joyce juan juana judith judy
    jules julia julian juliana julie juliet julio jun jürgen justin kai kamal karel karen karin karl karla
    karolina kate katharina katherine kathleen kathryn katie katja kay keith kelly ken kenji kenneth kerstin
    kevin kim kirsten klaus kofi konrad krishna kristen kristina kurt kyle lars laszlo laura lauren laurence
    laurent lea leah leila lena leo leon leonard leonardo leonie leslie lewis liam lily lina linda lisa liu
    logan lorenzo lothar louis louise lucas lucia lucy luigi luis luisa lukas luke lydia lynn madeleine
    madison magda magdalena maggie malcolm manuel manuela marc marcel marco marcos marcus margaret margarita
    maria mariam mariana marie marina mario marion marisol mark marko marlene marta martha martin martina
    mary maryam mateo mateusz mathias matteo matthew matthias maureen maurice max maximilian megan mehmet mei
    melanie melissa mercedes meredith mia michael michal michel michelle miguel mikael mike mikhail milan
    mildred milena miles mina miranda miriam mohamed mohammed moira molly monica monika morgan muhammad nadia
    nancy naomi natalia natalie natasha nathan nathaniel neil nelson nicholas nick nicola nicolas nicole
    niels nigel nikolai nils nina noah noel nora norma norman olaf oleg olga oliver olivia omar oscar oskar
    otto owen pablo pamela paolo patricia patrick paul paula pauline pavel pedro peggy penelope per peter
    petra philip philipp philippe phoebe phyllis pierre pietro piotr priya rachel rafael raj rajesh ralph
    ramon raquel raul ravi raymond rebecca reginald rene renate ricardo richard rita robert roberta roberto
    robin rodrigo roger roland rolf roman ronald rosa rosalie rosemary ross roxanne roy rudolf rupert russell
    ruth ryan sabine sally salma sam samantha samir samuel sandra sanjay santiago sara sarah scott sean
    sebastian sergei sergio seth shannon sharon sheila shirley sigrid silvia simon simone sofia sonia sonja
    sophia sophie stanley stefan stefanie stella stephan stephanie stephen steve steven stuart sunita susan
    susanna susanne svetlana sven sylvia tamara tanja tanya tara tatiana ted teresa terry thea theo theodore
    theresa thomas tim timothy tina tobias tom tomas tomasz tony tracy trevor ulrich ulrike ursula valentina
    valeria valerie vanessa vera veronica victor victoria viktor vincent viola virginia vivian vladimir
    walter wanda warren wayne wei wendy werner wilhelm will william wolfgang xavier yan yasmin yolanda yuki
    yusuf yvonne zachary zara zoe zofia zuzana
""")

SURNAMES = _words("""
    adams alvarez anderson andersson bailey baker bauer becker bell bennett berg bianchi brown bryant butler
    campbell carter castillo chang chavez clark clarke cohen cole collins colombo cooper costa cox cruz davies
    davis diaz dubois edwards evans ferrari fernandez fischer fisher flores foster fournier garcia gomez
    gonzalez graham gray green greco griffin gupta hall hansen harris harrison hayes henderson hernandez
    hoffmann horvat howard huang hughes hussain ivanov jackson jansen janssen jenkins jensen johansson johnson
    jones joshi kaminski kaplan kaur kelly khan kim klein koch kovacs kowalski krause kumar larsen larsson
    laurent lee lefebvre lehmann leroy lewis li lindberg long lopez marino marshall martin martinez mehta
    mendoza meyer miller mitchell moore morales moreau moreno morgan morris müller murphy murray nagy nelson
    nguyen nielsen nilsson novak nowak olsen olsson ortiz owens park parker patel perez perry petersen peterson
    petrov phillips pereira popescu powell price ramirez ramos reed reyes reynolds ricci richards richardson
    richter rivera roberts robinson rodriguez rogers romano romero rossi roux russell russo sanchez sanders
    santos schmidt schmitz schneider schröder schulz schwarz scott shah sharma silva simmons simon simpson
    singh smith sokolov sousa stewart sullivan suzuki svensson tanaka taylor thompson torres turner vargas
    vasquez wagner walker wang ward watson weber weiss white wilson wolf wong wright wu yamamoto yang yilmaz
    young zhang zhao zimmermann
""")

PLACES = _phrases("""
    afghanistan, albania, algeria, andorra, angola, argentina, armenia, australia, austria, azerbaijan, bahamas,
    bahrain, bangladesh, barbados, belarus, belgium, belize, benin, bhutan, bolivia, bosnia, botswana, brazil,
    brunei, bulgaria, burundi, cambodia, cameroon, canada, chile, china, colombia, congo, costa rica, croatia,
    cuba, cyprus, czech republic, czechia, denmark, djibouti, dominica, ecuador, egypt, el salvador, england,
    eritrea, estonia, ethiopia, fiji, finland, france, gabon, gambia, georgia, germany, ghana, greece, greenland,
    grenada, guatemala, guinea, guyana, haiti, honduras, hungary, iceland, india, indonesia, iran, iraq,
    ireland, israel, italy, ivory coast, jamaica, japan, kazakhstan, kenya, kosovo, kuwait, kyrgyzstan, laos,
    latvia, lebanon, lesotho, liberia, libya, liechtenstein, lithuania, luxembourg, madagascar, malawi, malaysia,
    maldives, mali, malta, mauritius, mexico, moldova, monaco, mongolia, montenegro, morocco, mozambique,
    myanmar, namibia, nepal, netherlands, new zealand, nicaragua, niger, nigeria, north macedonia, norway, oman,
    pakistan, palestine, panama, paraguay, peru, philippines, poland, portugal, qatar, romania, russia, rwanda,
    saudi arabia, scotland, senegal, serbia, seychelles, singapore, slovakia, slovenia, somalia, south africa,
    south korea, spain, sri lanka, sudan, suriname, sweden, switzerland, syria, taiwan, tajikistan, tanzania,
    thailand, togo, tonga, tunisia, turkey, türkiye, turkmenistan, uganda, ukraine, united kingdom, uk, usa, u.s.,
    united states, united arab emirates, uruguay, uzbekistan, vanuatu, venezuela, vietnam, wales, yemen, zambia,
    zimbabwe, europe, africa, asia,
    amsterdam, ankara, antwerp, athens, atlanta, auckland, austin, baghdad, bangkok, barcelona, basel, beijing,
    belfast, belgrade, berlin, bern, birmingham, bogota, bologna, bonn, bordeaux, boston, bratislava, bremen,
    brisbane, bristol, brussels, bucharest, budapest, buenos aires, cairo, calgary, cambridge, cape town, cardiff,
    casablanca, chicago, cologne, copenhagen, dallas, delhi, denver, detroit, dortmund, dresden, dubai, dublin,
    düsseldorf, edinburgh, florence, frankfurt, geneva, genoa, ghent, glasgow, gothenburg, graz, hamburg, hanoi,
    hanover, havana, helsinki, hong kong, houston, istanbul, jakarta, jerusalem, johannesburg, karachi, kiev,
    kobe, krakow, kyiv, kyoto, lagos, lausanne, leeds, leipzig, lille, lima, lisbon, liverpool, ljubljana, london,
    los angeles, lyon, madrid, malaga, manchester, manila, marseille, melbourne, miami, milan, minsk, montreal,
    moscow, mumbai, munich, nairobi, naples, new york, new york city, nice, nuremberg, osaka, oslo, ottawa, oxford,
    palermo, paris, philadelphia, phoenix, porto, prague, pretoria, quebec, reykjavik, riga, rio de janeiro, rome,
    rotterdam, salzburg, san diego, san francisco, santiago, sao paulo, sarajevo, seattle, seoul, seville,
    shanghai, sofia, stockholm, strasbourg, stuttgart, sydney, taipei, tallinn, tehran, tel aviv, the hague, tokyo,
    toronto, toulouse, trondheim, turin, utrecht, valencia, vancouver, venice, vienna, vilnius, warsaw,
    washington, wellington, zagreb, zurich, zürich,
    alabama, alaska, arizona, arkansas, california, colorado, connecticut, delaware, florida, hawaii, idaho,
    illinois, indiana, iowa, kansas, kentucky, louisiana, maine, maryland, massachusetts, michigan, minnesota,
    mississippi, missouri, montana, nebraska, nevada, new hampshire, new jersey, new mexico, north carolina,
    north dakota, ohio, oklahoma, oregon, pennsylvania, rhode island, south carolina, south dakota, tennessee,
    texas, utah, vermont, virginia, wisconsin, wyoming
""")

ORGANISATION_WORDS = _words("""
    ab academy ag agency airlines airways associates association authority bank bros capital center centre
    clinic club co college committee company computing consulting corp corporation council department electric
    electronics energy enterprises entertainment federation finance financial foundation fund gmbh group health
    healthcare holding holdings hospital inc incorporated industries institute insurance international
    laboratories laboratory labs limited llc llp logistics lp ltd media ministry motors nv networks oy
    partners partnership pharma pharmaceuticals plc press productions properties records research resources
    sa sas school securities services society software solutions sons spa srl studio studios systems
    technologies technology telecom trust union university ventures works
""")

STREET_WORDS = _words("""
    alley av ave avenue blvd boulevard circle close court crescent dr drive gardens grove highway hwy lane ln
    parade park parkway pike place plaza quay rd road row square st street terrace trail turnpike walk way
    calle avenida rua rue via viale piazza chemin quai allée impasse carrer paseo ulica ulitsa prospekt
    strada calea plaça corso
""")

STREET_ENDINGS = (
    "strasse straße str. gasse platz allee damm ufer straat laan gracht plein kade gatan vägen gata vegen veien"
    " gade vej katu tie kuja polku utca út stræti götu"
).split()

# Given names that are ordinary words as well, so that lower case does not tell.
AMBIGUOUS_NAMES = _words("""
    alma amber amy angel art aurora austin basil bill bob bruno carol chase daisy dawn don drew eve felix
    florence frank georgia grace hazel holly iris jack jan jasmine jean jordan joy jun kay kelly ken lea leo
    lily logan luke marina mark marina max may mercedes mike milan miles mina miranda nick nina noel norma olive
    omar owen paris pat paula penelope per petra ray rich robin rosa rosemary ross roxanne rudolf ruth sally
    sam sara sean seth sofia stella sue tara ted tom tony troy vera victoria viola virginia wanda warren wayne
    wei will
""")

DIRECTIONS = _words(
    "new north south east west upper lower great little saint st san santa old fort lake mount port"
)

MONTHS = {
    "en": "January February March April May June July August September October November December",
    "en-short": "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec",
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "it": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
    "nl": "januari februari maart april mei juni juli augustus september oktober november december",
}

CALENDAR = _words("monday tuesday wednesday thursday friday saturday sunday") | _words(
    " ".join(MONTHS.values()).lower()
)

ORDINARY = _words("""
    a able about above according account accounts across action actually add added additionally address
    addresses adventure advice after afterwards again against age ago agree ahead air all allow almost along
    already also although always am amazing american among amount an and animation another answer any anybody
    anyone anything anyway apart apparently appear application apply appointment are area around article as
    aside ask asked assistant at attached attention available away awesome baby back bad bank based basically
    be because become been before begin behind being believe below beside besides best better between big bill
    billing birthday black block blocked blood blue board body book born both bot bought bring brought brother
    budget build building bus business busy but buy by call called calling calls came can cancel cannot card
    cards care career case celebrating celebrity center certain certainly change charge charges chat check
    chief child children choose city class clean clear clearly click client close coffee cold come comedy comes
    coming committee company compare complete completely concerning conclusion confirm consider contact
    contacts content continue copy correct cost could country county course create credit currency current
    currently customer customers cut daily dance data date daughter day days deal dear death debit decide
    delete delivery department depending describe description design despite details diagnosis did died
    different dinner direct directed direction director discharge discount discover do doctor document does
    doing dollar don done door double down draft drama drive driver due during each earlier early earth easy
    eat editor education eight either eleven else email emails employee end energetic engineer english enjoy
    enough enter entire error especially even evening event eventually ever every everybody everyone
    everything everywhere evidence exactly examination example excellent except excuse experience explain
    extract eyes face fact family far fast father fax february feel feeling few fifteen fifth figure file files
    fill film finally find fine finish first five fix flight follow following food for form former four fourth
    free french friday friend friends from front full fun further game general german get getting girl give
    given gives glad go god going gold gone good got government grand graphic great green ground group guess
    guys had half hand happen happy hard has hate have having he head health hear heard heart hello help her
    here hers herself hey hi high highly him himself his history hold home hope horror hospital hotel hour
    hours house how however huge human hundred husband i idea if imagine immediately important in include
    included including income increase incredible indeed information initially input inside instead interest
    internal internet into introduction invoice is issue it item items its itself january job join joined just
    keep kid kids kind know known lab lady large last late lately later latest law lead leader learn leave left
    less let letter level life light like likely limit line link list listen little live lives local location
    london long look looking lose loss lost lot loud love low lunch machine made mail main major make makes
    making man manager many march mark market marriage married match matter may maybe me meanwhile measure
    medical medication meet meeting member members men mention message middle might million mind mine minister
    miss mission mobile model mom moment monday money month months more moreover morning most mostly mother
    move moved movie mr mrs ms much music must my myself mystery name named names national natural near nearly
    need needed needs neither never nevertheless new news next nice night nine no nobody non none nor normal
    north not note nothing notice now nowhere number numbers obviously october of off offer office officer
    official often oh ok okay old on once one online only open opened option options or order original other
    others otherwise our ours ourselves out outside over overall own page paid paragraph parent parents part
    particularly party pass password past patient patients pay payment people per perhaps period person
    personal phone physical place plan plans play player please plot plus point police poor position possible
    possibly post power practice pre prepare prescription present president press previous previously price
    private probably problem process producer product products program project proud provide public purchase
    put quality question questions quick quickly quite quote rather re reach read ready real really reason
    received recent recently record records red referred refund regarding regards register registered remember
    remind remove reply report request required rest restaurant result results return review rewrite right
    rock role romance room run safe said sale sales same sat saturday save saw say says school science search
    second secretary section security see seem seems seen sell send sent sentence september serious seriously
    service set seven several shall she short should show shows sign signed similarly simple simply since
    sincerely sing single sir sister site six skills sleep slowly small so social some somebody somehow
    someone something sometimes somewhere son song songs soon sorry south speak special spend start started
    statement station status stay still stop store stories story street strong student students study stuff
    subject such suddenly suggest sum summarise summarize summary sunday support sure surely suspense take
    taken takes taking talk tax teacher team tell ten term terms test text than thank thanks that the their
    them themselves then there therefore these they thing things think third this those though thought
    thousand three through throughout thursday thus ticket time title to today together tomorrow tonight too
    top total toward town track training transaction transfer translate travel treatment tribute tried trouble
    true trust truth try trying tuesday turn twelve twenty two type typically u ultimately under understand
    unfortunately unless unlike until up update upon urgent us use used user users using usually various very
    video view visit visitor wait waiting wake walk want wanted war was watch water way we wealth website
    wednesday week weekend weeks welcome well went were west what whatever when whenever where wherever
    whether which while white who whoever whole whom whose why wife will win window wish with within without
    woman women wonder word words work worked worker workers working works world worse worst worth would wow
    write writing written wrong year years yeah yellow yes yesterday yet you young your yours yourself zip
    april august december july june november atm ssn iban pin vip ceo cto cfo tv pc usd eur gbp faq asap id
    dvd cd pdf url http https html sms gps dna hiv mri ct ecg ekg bmi icu uti gp md phd bsc msc ba ma hr it
    english french german spanish italian dutch swedish danish norwegian finnish polish russian chinese
    chapter figure page volume step item version phase grade stage table episode season article appendix
    isn aren wasn weren doesn didn couldn wouldn shouldn hasn haven hadn won ain mustn awarded helped stripes
    energetic promote action sold closed hired managed led built achieved responsible
    japanese indian greek turkish arab arabic irish scottish welsh british european african asian christian
    catholic protestant jewish muslim islamic hindu buddhist republican democrat
""")
